"""The ops on FP8 tensor cores: the bits of quantization, the executors against each other and against live
bitsandbytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fp8fx.executors.registry import resolve
from fp8fx.nn import LinearFP8Global, LinearFP8Mixed
from fp8fx.ops.matmul import op
from fp8fx.recipes.formats import E4M3, E4M3_FULL, E5M2, block_size
from fp8fx.recipes.quantize import quantize
from fp8fx.recipes.recipe import Cast

HAS_TENSOR_CORES = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_TENSOR_CORES, reason="needs a CUDA device of compute capability 8.9 or higher"),
]

RECIPES = ("mixed", "global", "rowwise")
# What tensor cores' accumulation, which is not float32's, and rounding to the dtype may make of equal FP8 operands.
BOUNDS = {torch.float32: 3e-4, torch.float16: 1e-3, torch.bfloat16: 8e-3}

dtypes = pytest.mark.parametrize("dtype", BOUNDS, ids=str)
recipes = pytest.mark.parametrize("recipe", RECIPES)


def error(x: Tensor, reference: Tensor) -> float:
    x, reference = x.detach().double(), reference.detach().double()
    return float((x - reference).norm() / reference.norm())


def operands(m: int, k: int, n: int, dtype: torch.dtype) -> list[Tensor]:
    """a, weight, bias and the output's gradient; drawn on the CPU, so that they are the same on every device."""
    return [torch.randn(*shape).to("cuda", dtype) for shape in ((m, k), (n, k), (n,), (m, n))]


def train(f: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """Output and gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    out = f(*leaves)
    return out, *torch.autograd.grad(out, leaves, grad)


def linear(recipe: str, executor: str = "auto", bsz: int = -1, bsz2: int = -1) -> Callable[..., Tensor]:
    def f(a: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out: Tensor = op(recipe)(a, weight.t(), bsz, bsz2, bias=bias, executor=executor)
        return out

    return f


def test_auto_is_the_tensor_cores() -> None:
    assert resolve("auto", torch.device("cuda")).name == "scaled_mm"


# Quantization.


def hard(dtype: torch.dtype) -> Tensor:
    """Everything that a compiler could treat differently: extremes, zeros, non-finite values, a short last block."""
    x = (torch.randn(300, 1000) * torch.logspace(-4, 3, 300)[:, None]).to(dtype)
    x[0] = x[0].sign() * torch.finfo(dtype).max
    x[1] *= torch.finfo(dtype).smallest_normal / 16
    x[2] = 0
    x[3, 64:128] = 0
    x[4, 5], x[5, 70], x[6, 999] = math.inf, -math.inf, math.nan
    return x


def every_cast(x: Tensor, finite: Tensor) -> list[Tensor]:
    """Data and scale of every way to quantize; a non-finite value would spoil the only scale of a tensor."""
    quantized = [quantize(x, Cast(E4M3_FULL, "row"), 4096)]
    for fmt in (E4M3, E5M2):
        quantized += [
            quantize(finite, Cast(fmt, "tensor"), 64),
            quantize(x, Cast(fmt, "block"), 64),
            quantize(x, Cast(fmt, "block"), 4096),
        ]
    results: list[Tensor] = []
    for q in quantized:
        assert q.scale is not None
        results += [q.data, q.scale]
    return results


def assert_same_values(values: list[Tensor], expected: list[Tensor]) -> None:
    """Bit for bit, but for the bits of NaN."""
    for i, (x, y) in enumerate(zip(values, expected, strict=True)):
        assert x.dtype == y.dtype
        x, y = x.cpu().float(), y.cpu().float()
        assert torch.equal(x.isnan(), y.isnan()), i
        assert torch.equal(x.nan_to_num(0).view(torch.int32), y.nan_to_num(0).view(torch.int32)), i


@dtypes
def test_cpu_cuda_and_inductor_quantize_to_the_same_bits(dtype: torch.dtype) -> None:
    x = hard(dtype)
    inputs = x, x[7:].contiguous()
    on_cuda = [t.cuda() for t in inputs]
    expected = every_cast(*inputs)
    assert_same_values(every_cast(*on_cuda), expected)
    assert_same_values(torch.compile(every_cast, fullgraph=True, dynamic=False)(*on_cuda), expected)


# The executors.

SHAPES = [
    (5, 64, 64),
    (17, 100, 50),
    (1, 33, 7),
    (1, 4096, 512),
    (16, 4096, 512),
    (33, 128, 48),
    (130, 4100, 48),
    (9, 5000, 4104),
]


@recipes
@dtypes
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_scaled_mm_is_simulated(m: int, k: int, n: int, dtype: torch.dtype, recipe: str) -> None:
    *leaves, grad = operands(m, k, n, dtype)
    results = [train(linear(recipe, executor), leaves, grad) for executor in ("scaled_mm", "simulated")]
    for x, y in zip(*results, strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert error(x, y) <= BOUNDS[dtype]


@pytest.mark.parametrize("recipe", ["mixed", "rowwise"])
@pytest.mark.parametrize("m", [1, 16, 64, 200])
def test_checkpointing_changes_no_bit_of_a_few_rows(m: int, recipe: str) -> None:
    """What follows a GEMM is fused otherwise where the GEMM is computed again, and so must find the same rounded
    values."""
    first, second, x = (
        torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((512, 256), (256, 512), (m, 256))
    )
    leaves = [t.requires_grad_() for t in (x, first, second)]

    def mlp(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return x + linear(recipe)(nn.functional.gelu(linear(recipe)(x, first)), second)

    results = []
    for f in (mlp, lambda *args: checkpoint(mlp, *args, use_reentrant=False)):
        torch._dynamo.reset()
        out = torch.compile(f, fullgraph=True, dynamic=False)(*leaves)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), leaves)))
    assert all(torch.equal(plain, recomputed) for plain, recomputed in zip(*results, strict=True))


@dtypes
def test_several_blocks_a_row(dtype: torch.dtype) -> None:
    *leaves, grad = operands(9, 200, 150, dtype)
    results = [train(linear("mixed", executor, 64, 128), leaves, grad) for executor in ("scaled_mm", "simulated")]
    for x, y in zip(*results, strict=True):
        assert error(x, y) <= BOUNDS[dtype]


@dtypes
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_inductor_trains_as_eager_does(dynamic: bool, dtype: torch.dtype) -> None:
    def both(a: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear("mixed")(a, weight, bias) + linear("global")(torch.relu(a), weight)

    compiled = torch.compile(both, fullgraph=True, dynamic=dynamic)
    for m in (17, 48) if dynamic else (17,):
        *leaves, grad = operands(m, 100, 50, dtype)
        for x, y in zip(train(compiled, leaves, grad), train(both, leaves, grad), strict=True):
            assert (x.dtype, x.shape) == (y.dtype, y.shape)
            assert error(x, y) <= BOUNDS[dtype]


# Edges.


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "inductor"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan], ids=str)
def test_mixed_keeps_a_non_finite_value_in_its_row(value: float, compiled: bool) -> None:
    f = torch.compile(linear("mixed"), fullgraph=True) if compiled else linear("mixed")
    a, weight, _, _ = operands(5, 100, 50, torch.float32)
    clean = f(a, weight)
    a[1, 3] = value
    out = f(a, weight)
    assert not out[1].isfinite().any()
    assert torch.equal(out[[0, 2, 3, 4]], clean[[0, 2, 3, 4]])


@pytest.mark.parametrize("value", [math.inf, math.nan], ids=str)
def test_global_swallows_no_non_finite_value(value: float) -> None:
    a, weight, _, _ = operands(5, 100, 50, torch.float32)
    a[1, 3] = value
    assert not linear("global")(a, weight).isfinite().any()


@recipes
@dtypes
@pytest.mark.parametrize(("m", "k", "n"), [(0, 64, 48), (5, 0, 48), (5, 64, 0)])
def test_empty_operands_give_what_a_linear_gives(m: int, k: int, n: int, dtype: torch.dtype, recipe: str) -> None:
    *leaves, grad = operands(m, k, n, dtype)
    for x, y in zip(
        train(linear(recipe), leaves, grad), train(lambda a, w, b: a @ w.t() + b, leaves, grad), strict=True
    ):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert torch.equal(x, y)


@recipes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_the_operands(dtype: torch.dtype, recipe: str) -> None:
    leaves = operands(17, 100, 50, torch.float32)[:3]
    with torch.autocast("cuda", dtype=dtype):
        out = linear(recipe)(*leaves)
    assert out.dtype == dtype
    assert torch.equal(out, linear(recipe)(*(x.to(dtype) for x in leaves)))


@dtypes
@pytest.mark.parametrize("module", [LinearFP8Mixed, LinearFP8Global], ids=["mixed", "global"])
def test_modules(module: Any, dtype: torch.dtype) -> None:
    a, weight, bias, grad = operands(17, 100, 50, dtype)
    layer = module(100, 50, device="cuda", dtype=dtype)
    layer.load_state_dict({"weight": weight, "bias": bias})
    x = a.clone().requires_grad_()
    out = layer(x)
    results = out, *torch.autograd.grad(out, (x, layer.weight, layer.bias), grad)
    for value, expected in zip(results, train(linear(module.recipe), [a, weight, bias], grad), strict=True):
        assert torch.equal(value, expected)
    exact = nn.functional.linear(a, weight, bias)
    assert 1e-3 < error(out, exact) < 0.06  # FP8's noise: some, but no more


# bitsandbytes.

of_bitsandbytes = pytest.mark.parametrize("recipe", ["mixed", "global"])


def research(recipe: str) -> Callable[..., Tensor]:
    """The live op of bitsandbytes.research, with the block sizes that the shapes give."""
    ops = pytest.importorskip("bitsandbytes.research", reason="bitsandbytes 0.49.2 is the last with its research ops")
    from bitsandbytes.functional import create_fp8_map

    function = getattr(ops, f"matmul_fp8_{recipe}")
    fw_code, bw_code = create_fp8_map(True, 4, 3, 8).cuda(), create_fp8_map(True, 5, 2, 8).cuda()

    def f(a: Tensor, weight: Tensor) -> Tensor:
        n, k = weight.shape
        out: Tensor = function(a, weight.t(), fw_code=fw_code, bw_code=bw_code, bsz=block_size(k), bsz2=block_size(n))
        return out

    return f


@of_bitsandbytes
@pytest.mark.parametrize("executor", ["scaled_mm", "simulated"])
@pytest.mark.parametrize("k", [64, 1024, 4096])
def test_it_agrees_with_live_bitsandbytes_on_the_ladder(k: int, executor: str, recipe: str) -> None:
    a, weight, _, grad = operands(8, k, 64, torch.float32)
    expected = train(research(recipe), [a, weight], grad)
    for x, y in zip(train(linear(recipe, executor), [a, weight], grad), expected, strict=True):
        assert error(x, y) <= (2e-6 if executor == "simulated" else BOUNDS[torch.float32])


@of_bitsandbytes
@pytest.mark.parametrize(("m", "k", "n"), [(8, 64, 64), (6, 100, 48), (5, 200, 130), (3, 5000, 64)])
def test_the_bitsandbytes_executor_is_live_bitsandbytes(m: int, k: int, n: int, recipe: str) -> None:
    a, weight, _, grad = operands(m, k, n, torch.float32)
    expected = train(research(recipe), [a, weight], grad)
    for x, y in zip(train(linear(recipe, "bitsandbytes"), [a, weight], grad), expected, strict=True):
        assert error(x, y) <= 1e-6


@recipes
def test_the_bitsandbytes_executor_takes_any_layout(recipe: str) -> None:
    a, weight, _, _ = operands(96, 100, 48, torch.float32)
    strided = a.t().contiguous().t()
    assert not strided.is_contiguous()
    f = linear(recipe, "bitsandbytes")
    assert error(f(strided, weight), f(a, weight)) <= 1e-6


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@dtypes
@recipes
@pytest.mark.parametrize("m", [1, 100])
def test_a_strided_bias(m: int, recipe: str, dtype: torch.dtype, compiled: bool) -> None:
    a, weight, _, _ = operands(m, 64, 96, dtype)
    columns = torch.randn(96, 3).to("cuda", dtype)
    call = torch.compile(linear(recipe)) if compiled else linear(recipe)
    out, expected = call(a, weight, columns[:, 1]), linear(recipe)(a, weight, columns[:, 1].contiguous())
    assert error(out, expected) <= BOUNDS[dtype]


@pytest.mark.parametrize("recipe", ["mixed", "global"])
def test_the_bitsandbytes_executor_is_compiled_before_it_runs_eagerly(recipe: str) -> None:
    a, weight, bias, _ = operands(16, 64, 96, torch.bfloat16)
    out = torch.compile(linear(recipe, executor="bitsandbytes"))(a, weight, bias)
    assert error(out, linear(recipe, executor="bitsandbytes")(a, weight, bias)) <= BOUNDS[torch.bfloat16]
