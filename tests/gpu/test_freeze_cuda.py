"""fp8fx.freeze on a GPU: values, what a block of Llama becomes, CUDA graphs, and memory."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from torch.profiler import ProfilerActivity, profile

import fp8fx
from fp8fx import FP8Weight
from fp8fx.executors.hardware import has_fp8_tensor_cores
from fp8fx.recipes.quantize import sqnr
from fp8fx.recipes.recipe import RECIPES
from tests.support.llama import WIDTH, Llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not has_fp8_tensor_cores(torch.device("cuda")), reason="needs a CUDA device of compute capability >= 8.9"
    ),
]

recipes = pytest.mark.parametrize("recipe", sorted(RECIPES))


def frozen(recipe: str, count: int = 1, width: int = WIDTH) -> Any:
    model = nn.Sequential(*[Llama(width) for _ in range(count)]).to("cuda", torch.bfloat16).requires_grad_(False)
    fp8fx.freeze(model, recipe)
    return model


def tokens(*leading: int, width: int = WIDTH) -> Tensor:
    return torch.randn(*leading, width, device="cuda", dtype=torch.bfloat16)


def allocated() -> int:
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


@recipes
@pytest.mark.parametrize("length", [1, 5, 64, 512])
def test_eager_and_compiled_are_as_close_as_the_simulation(length: int, recipe: str) -> None:
    torch.manual_seed(0)
    exact = nn.Sequential(Llama()).to("cuda", torch.bfloat16).requires_grad_(False)
    model, x = copy.deepcopy(exact), tokens(2, length)
    fp8fx.freeze(model, recipe)
    with torch.no_grad():
        reference = exact(x)
        simulation = sqnr(reference, fp8fx.convert(exact, recipe=recipe, executor="simulated")(x))
        for call in (model, torch.compile(model), torch.compile(model, backend="fp8")):
            assert sqnr(reference, call(x)) > simulation - 1.0  # dB


@recipes
def test_a_block_of_llama_is_four_gemms(recipe: str) -> None:
    model = frozen(recipe)
    with torch.no_grad():
        _, (code,) = run_and_get_code(torch.compile(model, backend="fp8"), tokens(2, 64))
    assert code.count("extern_kernels._scaled_mm(") == 4  # qkv, o, gate and up, down
    assert "extern_kernels.mm(" not in code


def test_equal_blocks_share_a_graph() -> None:
    model, x = frozen("rowwise", count=6), tokens(1, 64)
    counters.clear()
    for layer in model:
        layer.compile(backend="fp8")
    with torch.no_grad():
        model(x)
    assert counters["stats"]["unique_graphs"] == 1


@recipes
@pytest.mark.parametrize("length", [1, 64])
def test_cuda_graphs_copy_no_weight(length: int, recipe: str) -> None:
    model = frozen(recipe, count=2, width=1024)
    call = torch.compile(model, backend="fp8", mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(4):
            x = tokens(1, length, width=1024)
            torch.compiler.cudagraph_mark_step_begin()
            assert sqnr(model(x), call(x).clone()) > 25
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            torch.compiler.cudagraph_mark_step_begin()
            call(tokens(1, length, width=1024))
            torch.cuda.synchronize()
    names = [event.key for event in trace.key_averages()]
    assert not any("cat" in name.lower() and "Batched" in name for name in names), names
    copied = sum(getattr(event, "bytes", 0) or 0 for event in trace.events() if "Memcpy DtoD" in event.name)
    assert copied <= 2 * x.nbytes  # the input's own


def test_a_change_is_seen_in_a_cuda_graph() -> None:
    model, other = frozen("rowwise"), frozen("rowwise")
    call, x = torch.compile(model, backend="fp8", mode="reduce-overhead"), tokens(1, 16)
    with torch.no_grad():
        for _ in range(3):
            before = call(x).clone()
        model.load_state_dict(other.state_dict())
        after = call(x).clone()
        assert sqnr(other(x), after) > 25
        assert sqnr(before, after) < 20
        model[0].o.weight.copy_(torch.randn(WIDTH, WIDTH))
        assert sqnr(model(x), call(x).clone()) > 25


def test_a_frozen_model_takes_half_of_bfloat16s_memory() -> None:
    before = allocated()
    model = nn.Sequential(*[Llama(1024) for _ in range(2)]).to("cuda", torch.bfloat16).requires_grad_(False)
    exact = allocated() - before
    fp8fx.freeze(model)
    assert allocated() - before <= 0.53 * exact
    call = torch.compile(model, backend="fp8")
    with torch.no_grad():
        call(tokens(1, 16, width=1024))
    assert allocated() - before <= 0.56 * exact  # siblings were laid side by side


def test_a_model_from_the_meta_device_takes_two_weights_more_at_most() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*[Llama(4096) for _ in range(2)]).bfloat16().requires_grad_(False)
    fp8fx.freeze(model)
    before = allocated()
    torch.cuda.reset_peak_memory_stats()
    model.to_empty(device="cuda")
    resident = allocated() - before
    largest = max(x.numel() * 2 for x in model.parameters())
    for name, x in list(model.named_parameters()):
        state = {name: torch.randn(x.shape, dtype=torch.bfloat16)}
        model.load_state_dict(state, strict=False)
    assert torch.cuda.max_memory_allocated() - before <= resident + 2 * largest
    assert sum(isinstance(x, FP8Weight) for x in model.parameters()) == 14
    with torch.no_grad():
        assert model(tokens(1, 8, width=4096)).isfinite().all()


@recipes
def test_moves_between_devices(recipe: str) -> None:
    model, x = frozen(recipe), tokens(1, 16)
    with torch.no_grad():
        y = model(x)
        there = model.cpu()
        assert {p.device.type for p in there.parameters()} == {"cpu"}
        assert torch.equal(there.cuda()(x), y)


@recipes
def test_the_gradient_of_the_input(recipe: str) -> None:
    model, x = frozen(recipe), tokens(2, 64)
    grads = []
    for call in (model, torch.compile(model), torch.compile(model, backend="fp8")):
        leaf = x.clone().requires_grad_()
        call(leaf).float().square().mean().backward()
        grads.append(leaf.grad)
    assert all(sqnr(grads[0], grad) > 10 for grad in grads[1:])
