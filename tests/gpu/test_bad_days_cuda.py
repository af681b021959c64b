"""Bad days on tensor cores: odd and very large shapes, hard numbers, the cache on disk, CUDA graphs whose inputs
change, a static cache."""

from __future__ import annotations

import fcntl
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fp8fx
from fp8fx.executors.hardware import has_fp8_tensor_cores
from fp8fx.ops.matmul import op
from tests.support.caching import assert_the_cache_knows_a_configuration_from_another
from tests.support.numbers import (
    CALLS,
    HOW,
    SCALES,
    SUBNORMAL,
    assert_every_bit,
    assert_no_row_harms_another,
    assert_outliers_cost_no_precision,
    assert_subnormals_lose_no_more_than_other_numbers,
    assert_zero_weights_give_the_bias,
)
from tests.support.shapes import Narrow, Siblings, assert_as_written, compiled_at, every_recipe, narrow, siblings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not has_fp8_tensor_cores(torch.device("cuda")), reason="needs a CUDA device of compute capability >= 8.9"
    ),
]

RECIPES = ("mixed", "global", "rowwise")
recipes = pytest.mark.parametrize("recipe", RECIPES)


def error(value: Tensor, reference: Tensor) -> float:
    value, reference = value.detach().double(), reference.detach().double()
    return float((value - reference).norm() / reference.norm())


# Shapes.


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
def test_no_length_is_compiled_that_eager_does_not_compile(dynamic: bool | None, train: bool) -> None:
    expected = compiled_at(lambda gm, inputs: gm.forward, train, dynamic, "cuda")
    assert compiled_at(every_recipe, train, dynamic, "cuda") == expected


def test_a_model_may_see_an_empty_batch_first() -> None:
    assert_as_written(Siblings().cuda(), siblings, (0, 64), (3, 64), (200, 64))


def test_features_that_are_fewer_than_16_or_no_multiple_of_it() -> None:
    assert_as_written(Narrow().cuda(), narrow, (5, 17), (100, 17))


@pytest.fixture
def large() -> Iterator[None]:
    """For a test that takes some 40 GB: of several processes that share the device one at a time has it."""
    with open(Path(tempfile.gettempdir()) / "fp8fx_large", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()


M, K, N = 600_000, 4096, 64
# The first and the last row, and those around element 2**31.
ROWS = [0, 1, 2**31 // K - 1, 2**31 // K, 2**31 // K + 1, M - 2, M - 1]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "inductor"])
@recipes
@pytest.mark.usefixtures("large")
def test_more_elements_than_an_int32_counts(recipe: str, compiled: bool) -> None:
    a, grad = (torch.randn(M, width, device="cuda", dtype=torch.bfloat16) for width in (K, N))
    a[-1, 0] = grad[-1, 0] = 16  # the largest of all: the scales of a tensor are those of ROWS alone
    weight = (torch.randn(N, K, device="cuda", dtype=torch.bfloat16) / 64).requires_grad_()

    def f(a: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = op(recipe)(a, weight.t())
        return out

    rows = a[ROWS].requires_grad_()
    expected = f(rows, weight)
    expected_grad = torch.autograd.grad(expected, rows, grad[ROWS])[0]
    expected_weight_grad = grad.t() @ a
    out = (torch.compile(f, fullgraph=True) if compiled else f)(a.requires_grad_(), weight)
    grad_a, grad_weight = torch.autograd.grad(out, (a, weight), grad)
    for i, row in enumerate(ROWS):
        assert error(out[row], expected[i]) < 1e-2, row
        assert error(grad_a[row], expected_grad[i]) < 1e-2, row
    assert error(grad_weight, expected_weight_grad) < (1e-2 if recipe == "mixed" else 0.1)


def assert_first_and_last_rows(m: int, rows: Sequence[int], recipe: str, freeze: bool, device: str) -> None:
    """Of an input and an output of `m` rows of K features, through the backend; the gradients of the weights sum over
    all."""
    model = (
        nn.Sequential(nn.Linear(K, N), nn.GELU(), nn.Linear(N, K)).to(device, torch.bfloat16).requires_grad_(not freeze)
    )
    call = torch.compile(
        model, backend="fp8", fullgraph=True, options={"recipe": recipe, "freeze": freeze, "profit": "always"}
    )
    x, far = (
        torch.randn(m, K, device=device, dtype=torch.bfloat16),
        0.15,
    )  # of FP8 alone, in two layers; a wrong row has at least 1
    few = x[rows].requires_grad_()
    expected = model(few)
    with torch.set_grad_enabled(not freeze):
        out = call(x.requires_grad_(not freeze))
    for i, row in enumerate(rows):
        assert error(out[row], expected[i]) < far, row
    if freeze:
        return
    grad = torch.randn_like(out)
    (expected_x,) = torch.autograd.grad(expected, few, grad[rows])
    grad_x, *grads = torch.autograd.grad(out, (x, *model.parameters()), grad)
    for i, row in enumerate(rows):
        assert error(grad_x[row], expected_x[i]) < far, row
    for part, of_part in zip(
        x.detach().split(m // 8), grad.split(m // 8), strict=True
    ):  # none of which has that many elements
        model(part).backward(of_part)
    for (name, p), value in zip(model.named_parameters(), grads, strict=True):
        assert p.grad is not None and error(value, p.grad) < far, name


@pytest.mark.parametrize("freeze", [False, True], ids=["training", "frozen"])
@recipes
@pytest.mark.usefixtures("large")
def test_more_elements_than_an_int32_counts_through_the_backend(recipe: str, freeze: bool) -> None:
    assert_first_and_last_rows(M, ROWS, recipe, freeze, "cuda")


# Numbers.


@pytest.mark.parametrize("rows", [12, 100])  # few rows are scaled after the GEMM
@pytest.mark.parametrize("how", CALLS)
def test_a_row_harms_no_other(how: str, rows: int) -> None:
    assert_no_row_harms_another(how, rows, "cuda")


hows = pytest.mark.parametrize("how", HOW)


@recipes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@hows
def test_tiny_and_huge_values_keep_every_bit(how: str, dtype: torch.dtype, recipe: str) -> None:
    train = HOW[how](recipe)
    for exponents in SCALES:
        assert_every_bit(exponents, dtype, train, "cuda")


@recipes
@hows
def test_fp16_subnormals_lose_no_more_than_other_numbers(how: str, recipe: str) -> None:
    train = HOW[how](recipe)
    for where, exponent in SUBNORMAL:
        assert_subnormals_lose_no_more_than_other_numbers(where, exponent, train, "cuda")


@recipes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@hows
def test_a_channel_of_outliers_leaves_the_others_their_precision(how: str, dtype: torch.dtype, recipe: str) -> None:
    assert_outliers_cost_no_precision(dtype, HOW[how](recipe), "cuda")


@recipes
@pytest.mark.parametrize("freeze", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_zero_weights_give_the_bias(compiled: bool, freeze: bool, recipe: str) -> None:
    assert_zero_weights_give_the_bias(recipe, freeze, compiled, "cuda")


# The cache on disk.


def test_the_cache_on_disk_knows_a_configuration_from_another_and_again_in_the_next_process(tmp_path: Path) -> None:
    assert_the_cache_knows_a_configuration_from_another(tmp_path, "cuda")


# CUDA graphs.


@recipes
def test_a_training_step_in_a_cuda_graph_reads_new_inputs_and_new_weights(recipe: str) -> None:
    initial = nn.Sequential(nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 256)).cuda().state_dict()
    batches = torch.randn(8, 64, 256, device="cuda")

    def losses(**kwargs: Any) -> list[float]:
        torch._dynamo.reset()
        model, found = nn.Sequential(nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 256)).cuda(), []
        model.load_state_dict(initial)
        call: Callable[[Tensor], Tensor] = torch.compile(
            model, backend=fp8fx.Backend(fp8fx.Config(recipe=recipe, profit="always")), fullgraph=True, **kwargs
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
        for x in batches:
            torch.compiler.cudagraph_mark_step_begin()
            optimizer.zero_grad()
            loss = F.mse_loss(call(x), x)
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    expected = losses()
    assert losses(mode="reduce-overhead") == pytest.approx(expected, rel=1e-2)
    assert max(expected) - min(expected) > 0.1 * expected[0]


# A static cache.


# Not in CUDA graphs: there torch 2.11.0 with transformers 5.17.0 crashes while it records the cache, under plain
# Inductor as under ours.
@pytest.mark.parametrize("recipe", ["mixed", "rowwise"])
def test_a_static_cache_gives_the_tokens_of_a_prefill(recipe: str) -> None:
    generate = pytest.importorskip("tests.inductor.test_generate", reason="transformers is not installed").generate
    tokens, decoded, prefilled = generate("cuda", recipe)
    # Not every bit: another number of rows is another kernel, of the GEMMs and of attention, and where its sums differ
    # by an ulp, which they do in high precision too, a value is pushed over to the next FP8 value. So near ties may be
    # decided otherwise.
    assert error(decoded, prefilled) < 3e-2
    chosen = prefilled.gather(-1, tokens[..., None])[..., 0]
    assert bool((prefilled.amax(-1) - chosen < 0.1 * prefilled.std()).all())
