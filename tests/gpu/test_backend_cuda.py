"""The backend on FP8 tensor cores: training and inference, CUDA graphs, dynamic shapes, autocast, what Inductor makes
of it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import fp8fx
from benchmarks.models import LlamaBlock, stack
from fp8fx.backend import fp8
from fp8fx.executors.hardware import has_fp8_tensor_cores
from fp8fx.recipes.quantize import sqnr

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not has_fp8_tensor_cores(torch.device("cuda")), reason="needs a CUDA device of compute capability >= 8.9"
    ),
]

WIDTH = 256  # too narrow for FP8 to gain anything: these tests ask for it always
ALWAYS = fp8fx.Backend(fp8fx.Config(profit="always"))


class Block(nn.Module):
    """A transformer block: linears in sibling groups, with and without bias, one as GPT-2's addmm over a (K, N)
    weight."""

    def __init__(self, width: int = WIDTH, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, width, bias=False), nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.up_weight, self.up_bias = (
            nn.Parameter(0.05 * torch.randn(width, 3 * width)),
            nn.Parameter(torch.zeros(3 * width)),
        )
        self.down = nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        h = self.norm1(x)
        q, k, v = (
            f(h).view(batch, length, self.heads, width // self.heads).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))
        h = self.norm2(x).reshape(-1, width)
        return x + self.down(F.gelu(torch.addmm(self.up_bias, h, self.up_weight))).view(x.shape)


def model_and_input(dtype: torch.dtype = torch.bfloat16, rows: int = 64) -> tuple[nn.Module, Tensor]:
    model = Block().cuda().to(dtype)
    return model, torch.randn(2, rows, WIDTH, device="cuda", dtype=dtype, requires_grad=True)


def results(call: Any, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the input's gradient, and all the parameters' gradients as one vector."""
    out = call(x)
    grad_x, *grads = torch.autograd.grad(out, (x, *model.parameters()), torch.ones_like(out))
    return out, grad_x, torch.cat([grad.flatten() for grad in grads])


@pytest.mark.parametrize(
    ("recipe", "dtype"),
    [("mixed", torch.bfloat16), ("global", torch.bfloat16), ("mixed", torch.float16), ("global", torch.float32)],
)
def test_training_is_as_close_to_high_precision_as_the_simulation(recipe: str, dtype: torch.dtype) -> None:
    model, x = model_and_input(dtype)
    exact = results(model, model, x)
    compiled = results(
        torch.compile(model, backend=fp8, fullgraph=True, options={"recipe": recipe, "profit": "always"}), model, x
    )
    simulated = results(fp8fx.convert(model, recipe=recipe, executor="simulated"), model, x)
    for reference, tensor_cores, simulation in zip(exact, compiled, simulated, strict=True):
        assert sqnr(reference, tensor_cores) > sqnr(reference, simulation) - 1.0  # dB


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune-no-cudagraphs"])
def test_modes(mode: str) -> None:
    model, _ = model_and_input()
    compiled = torch.compile(model, backend=ALWAYS, mode=mode)
    converted = fp8fx.convert(model)
    with torch.no_grad():
        for _ in range(4):  # a CUDA graph warms up, records, then replays over new inputs
            x = torch.randn(2, 64, WIDTH, device="cuda", dtype=torch.bfloat16)
            assert sqnr(converted(x), compiled(x).clone()) > 30


def test_inductor_calls_scaled_mm_and_nothing_opaque() -> None:
    model, x = model_and_input()
    with torch.no_grad():
        _, (code,) = run_and_get_code(torch.compile(model, backend=ALWAYS), x)
    assert code.count("extern_kernels._scaled_mm(") == 6
    assert (
        "extern_kernels.mm(" not in code
        and "extern_kernels.addmm(" not in code
        and "fp8fx." not in code.split("async_compile.wait")[1]
    )
    assert "norm" in code and any(
        "norm" in line and "amax" in line for line in code.splitlines() if line.startswith("triton_")
    )


def test_a_frozen_block_has_one_kernel_that_only_quantizes() -> None:
    """docs/performance_log.md: four GEMMs, attention, and two norms, SwiGLU and attention's output with an amax and a
    cast each."""
    counts = []
    for depth in (1, 2):
        torch._dynamo.reset()
        model = stack(
            LlamaBlock, depth, width=1024, hidden=3584, heads=8, kv_heads=2
        )  # no GEMM so small that it is scaled afterwards
        x = torch.randn(4, 1024, 1024, device="cuda", dtype=torch.bfloat16)
        options = {"recipe": "rowwise", "freeze": True, "profit": "always"}
        with torch.no_grad():
            _, (code,) = run_and_get_code(torch.compile(model, backend=fp8, options=options), x)
        kernels = re.findall(r"^ +(triton_\w+)\.run\(", code, re.MULTILINE)
        alone = [name for name in kernels if "amax" in name and not re.search("norm|rsqrt|silu|sigmoid", name)]
        attention = re.findall(r"= torch\.ops\.aten\._scaled_dot_product_\w+\.default\(", code)
        counts.append((len(kernels), code.count("extern_kernels._scaled_mm("), len(attention), len(alone)))
    assert counts == [(4 + 1, 4, 1, 1), (8 + 1, 8, 2, 2)]  # and the last residual


def test_every_length_without_more_compilations_than_eager() -> None:
    def compilations(backend: Any) -> int:
        torch._dynamo.reset()
        model, count = model_and_input()[0], 0

        def counting(gm: Any, inputs: Any) -> Any:
            nonlocal count
            count += 1
            return backend(gm, inputs)

        compiled = torch.compile(model, backend=counting)
        for length in (16, 17, 18, 33, 200, 1, 0):
            x = torch.randn(2, length, WIDTH, device="cuda", dtype=torch.bfloat16)
            out = compiled(x)
            assert out.isfinite().all()
            out.sum().backward()
        return count

    global_recipe = fp8fx.Backend(fp8fx.Config(recipe="global", profit="always"))
    assert compilations(ALWAYS) == compilations(global_recipe) == compilations(lambda gm, inputs: gm.forward)


def test_autocast() -> None:
    model, x = model_and_input(torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        compiled, eager = torch.compile(model, backend=ALWAYS)(x), model(x)
        converted = fp8fx.convert(model)(x)
    assert compiled.dtype == eager.dtype
    assert sqnr(eager, compiled) > sqnr(eager, converted) - 1.0


def test_explain_names_the_executor() -> None:
    model, x = model_and_input()
    report = ALWAYS.explain(model, x)
    assert {row.executor for row in report.rewritten} == {"scaled_mm"}
    assert len(report.rewritten) == 6
