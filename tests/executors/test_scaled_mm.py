"""What is handed to `torch._scaled_mm`, and what comes back.

Its CPU version takes any shape and layout (and before torch 2.13 no scale per row), so a stand-in takes its place: it
asserts what the tensor cores need and multiplies in float64. The product then has to equal the simulated one. tests/gpu
has the real one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fp8fx.executors import hardware, scaled_mm
from fp8fx.executors.executor import Executor
from fp8fx.executors.registry import EXECUTORS
from fp8fx.executors.scaled_mm import ScaledMM
from fp8fx.executors.simulated import Simulated
from fp8fx.ops.matmul import op
from fp8fx.recipes.formats import E4M3, E4M3_FULL, E5M2
from fp8fx.recipes.quantize import Quantized, quantize, sqnr
from fp8fx.recipes.recipe import RECIPES, Cast

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROUNDING = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
TENSOR, BLOCK, GRAD = Cast(E4M3, "tensor"), Cast(E4M3, "block"), Cast(E5M2, "block")

Calls = list[dict[str, Any]]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def check(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> None:
    """The rules of `torch._scaled_mm` on CUDA, as measured there."""
    assert a.dim() == b.dim() == 2
    (m, k), n = a.shape, b.shape[1]
    assert b.shape[0] == k
    assert k % 16 == n % 16 == 0
    assert a.stride() == (k, 1), "a is not row-major"
    assert b.stride() == (1, k), "b is not column-major"
    assert {a.dtype, b.dtype} <= {torch.float8_e4m3fn, torch.float8_e5m2}
    assert not a.dtype == b.dtype == torch.float8_e5m2
    assert scale_a.dtype == scale_b.dtype == torch.float32
    assert (scale_a.shape, scale_b.shape) in [((), ()), ((m, 1), (1, n))]
    assert scale_a.is_contiguous()
    assert scale_b.is_contiguous()
    if bias is not None:
        assert bias.dtype == out_dtype != torch.float32
        assert bias.shape == (n,)
        assert bias.is_contiguous()


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Puts the stand-in in the place of `torch._scaled_mm`, and lists its calls."""
    seen: Calls = []

    def nan_placeholder(
        a: Tensor,
        b: Tensor,
        scale_a: Tensor,
        scale_b: Tensor,
        *,
        bias: Tensor | None,
        out_dtype: torch.dtype,
        use_fast_accum: bool,
    ) -> Tensor:
        check(a, b, scale_a, scale_b, bias, out_dtype)
        seen.append({"a": a, "b": b, "bias": bias, "out_dtype": out_dtype, "fast": use_fast_accum, "scale_a": scale_a})
        out = (a.double() * scale_a) @ (b.double() * scale_b)
        return (out if bias is None else out + bias.double()).to(out_dtype)

    monkeypatch.setattr(scaled_mm, "scaled_mm", nan_placeholder)
    return seen


@pytest.fixture
def tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the ops use this executor on the CPU."""
    monkeypatch.setattr(hardware, "has_fp8_tensor_cores", lambda device: True)


def error(x: Tensor, reference: Tensor) -> float:
    x, reference = x.detach().double(), reference.detach().double()
    return float((x - reference).norm() / reference.norm())


def both(
    lhs: Quantized,
    rhs: Quantized,
    block: int,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    never_recomputed: bool = False,
) -> tuple[Tensor, Tensor]:
    """The product in `dtype`, and the simulated one in float64."""
    out = ScaledMM().matmul(lhs, rhs, block=block, dtype=dtype, bias=bias, never_recomputed=never_recomputed)
    assert out.dtype == dtype
    return out, Simulated().matmul(
        lhs, rhs, block=block, dtype=torch.float64, bias=None if bias is None else bias.double()
    )


def test_it_is_the_executor_of_that_name_and_quantizes_as_numerics_does() -> None:
    assert type(EXECUTORS["scaled_mm"]) is ScaledMM
    assert ScaledMM.quantize is Executor.quantize


@dtypes
@pytest.mark.parametrize("cast", [TENSOR, BLOCK, GRAD], ids=["per tensor", "per row", "per row, e5m2"])
@pytest.mark.parametrize(
    ("m", "k", "n"),
    [
        (5, 64, 64),
        (17, 100, 50),
        (1, 33, 7),
        (16, 16, 16),
        (3, 4100, 48),
        (1, 1, 1),
        (2, 48, 17),
        (65, 64, 64),
        (70, 100, 50),
    ],
)
def test_any_shape_fits(m: int, k: int, n: int, cast: Cast, dtype: torch.dtype, calls: Calls) -> None:
    lhs, rhs = quantize(torch.randn(m, k), cast, 4096), quantize(torch.randn(n, k), TENSOR, 4096)
    out, expected = both(lhs, rhs, 4096, dtype)
    assert out.shape == (m, n)
    assert error(out, expected) <= ROUNDING[dtype]
    assert len(calls) == 1
    assert calls[0]["a"].shape == (m, -(-k // 16) * 16)  # M is never padded
    assert calls[0]["b"].shape[1] == -(-n // 16) * 16


@dtypes
@pytest.mark.parametrize(("k", "block", "blocks"), [(200, 64, 4), (128, 64, 2), (260, 128, 3), (100, 128, 1)])
def test_each_block_is_a_gemm_summed_in_float32(
    k: int, block: int, blocks: int, dtype: torch.dtype, calls: Calls
) -> None:
    x = torch.randn(5, k) * torch.logspace(-3, 3, k)  # blocks of very different scales
    bias = torch.randn(20).to(dtype)
    out, expected = both(quantize(x, BLOCK, block), quantize(torch.randn(20, k), TENSOR, block), block, dtype, bias)
    assert error(out, expected) <= ROUNDING[dtype]
    assert len(calls) == blocks
    if blocks > 1:
        assert {call["out_dtype"] for call in calls} == {torch.float32}


@dtypes
def test_transposed_operands_are_laid_out_anew(dtype: torch.dtype) -> None:
    lhs, rhs = quantize(torch.randn(48, 30), TENSOR, 64), quantize(torch.randn(48, 33), TENSOR, 64)
    out, expected = both(Quantized(lhs.data.t(), lhs.scale), Quantized(rhs.data.t(), rhs.scale), 64, dtype)
    assert out.shape == (30, 33)
    assert error(out, expected) <= ROUNDING[dtype]


@dtypes
@pytest.mark.parametrize(
    ("n", "cast"), [(32, TENSOR), (32, BLOCK), (20, TENSOR)], ids=["per tensor", "per row", "padded"]
)
def test_bias(n: int, cast: Cast, dtype: torch.dtype, calls: Calls) -> None:
    lhs, rhs, bias = (
        quantize(torch.randn(65, 64), cast, 64),
        quantize(torch.randn(n, 64), TENSOR, 64),
        torch.randn(n).to(dtype) * 10,
    )
    out, expected = both(lhs, rhs, 64, dtype, bias)
    assert error(out, expected) <= ROUNDING[dtype]
    # The epilogue takes it where it can: 16-bit output and no padded column.
    assert (calls[0]["bias"] is bias) == (dtype != torch.float32 and n % 16 == 0)


@dtypes
@pytest.mark.parametrize("never_recomputed", [False, True])
@pytest.mark.parametrize(
    ("m", "n", "after"), [(1, 20, True), (64, 20, True), (64, 16400, True), (65, 16128, True), (65, 16144, False)]
)
def test_few_rows_and_small_results_that_are_computed_once_are_scaled_after_the_gemm(
    m: int, n: int, after: bool, never_recomputed: bool, dtype: torch.dtype, calls: Calls
) -> None:
    after &= never_recomputed
    rows = Cast(E4M3_FULL, "row")
    x, bias = torch.randn(m, 16) * torch.logspace(-3, 3, m)[:, None], torch.randn(n).to(dtype)
    out, expected = both(
        quantize(x, rows, 16), quantize(torch.randn(n, 16), rows, 16), 16, dtype, bias, never_recomputed
    )
    assert error(out, expected) <= ROUNDING[dtype]
    (call,) = calls
    # One scale a tensor, of 1, whose product float16 could not hold.
    assert (call["scale_a"].dim(), call["out_dtype"]) == ((0, torch.float32) if after else (2, dtype))


def test_the_stand_in_refuses_two_e5m2_operands() -> None:
    q = quantize(torch.randn(16, 16), GRAD, 64)
    with pytest.raises(AssertionError):
        ScaledMM().matmul(q, q, block=64, dtype=torch.float32)


@pytest.mark.parametrize("fast", [False, True])
def test_fast_is_passed_on(fast: bool, calls: Calls) -> None:
    lhs, rhs = quantize(torch.randn(5, 128), BLOCK, 64), quantize(torch.randn(16, 128), TENSOR, 64)
    ScaledMM().matmul(lhs, rhs, block=64, dtype=torch.bfloat16, fast=fast)
    assert [call["fast"] for call in calls] == [fast, fast]


def test_non_finite_rows_stay_in_their_row() -> None:
    x = torch.randn(5, 100)
    x[1, 3], x[3, 99] = float("inf"), float("nan")
    out = ScaledMM().matmul(
        quantize(x, BLOCK, 64), quantize(torch.randn(7, 100), TENSOR, 64), block=64, dtype=torch.float32
    )
    assert out.isfinite().all(1).tolist() == [True, False, True, False, True]
    assert not out[[1, 3]].isfinite().any()


def run(
    recipe: str, dtype: torch.dtype, executor: str, m: int, k: int, n: int, bsz: int, bsz2: int
) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    operands = [torch.randn(*shape).to(dtype).requires_grad_() for shape in ((m, k), (k, n), (n,))]
    a, b, bias = operands
    out = op(recipe)(a, b, bsz, bsz2, bias=bias, executor=executor)
    return out, *torch.autograd.grad(out, operands, torch.randn_like(out))


@pytest.mark.usefixtures("tensor_cores")
@dtypes
@pytest.mark.parametrize("recipe", ["mixed", "global", "rowwise"])
@pytest.mark.parametrize(
    "shape", [(5, 64, 64, -1, -1), (17, 100, 50, -1, -1), (1, 33, 7, -1, -1), (9, 200, 150, 64, 128)], ids=str
)
def test_all_three_gemms_of_the_ops(shape: tuple[int, ...], recipe: str, dtype: torch.dtype, calls: Calls) -> None:
    real = run(recipe, dtype, "scaled_mm", *shape)
    gemms = {"mixed": 2, "global": 3, "rowwise": 3}[recipe]
    assert len(calls) >= gemms
    e5m2 = [torch.float8_e5m2 in (call["a"].dtype, call["b"].dtype) for call in calls]
    assert sum(e5m2) >= gemms - 1 if recipe != "rowwise" else not any(e5m2)
    # Fast accumulation: in forward and dgrad, where bfloat16's own rounding hides it; never in wgrad, which is the
    # last.
    wgrads = 0 if recipe == "mixed" else 1
    assert [call["fast"] for call in calls] == [dtype == torch.bfloat16] * (len(calls) - wgrads) + [False] * wgrads
    for x, y in zip(real, run(recipe, dtype, "simulated", *shape), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert error(x, y) <= 2 * ROUNDING[dtype]  # the simulated one rounds in `dtype` too


@pytest.mark.usefixtures("tensor_cores")
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("m", [1, 16, 64, 100])
def test_only_a_frozen_weight_has_its_product_computed_once(m: int, frozen: bool, calls: Calls) -> None:
    """With checkpointing a training step computes it again, and relies on the same bits."""
    a, weight = torch.randn(m, 64), torch.randn(48, 64)
    q = quantize(weight, Cast(E4M3_FULL, "row"), -1)
    if frozen:
        op("rowwise")(a, q.data.t(), b_scale=q.scale, executor="scaled_mm")
    else:
        op("rowwise")(a, weight.t(), executor="scaled_mm")
    assert [call["scale_a"].dim() for call in calls] == [0 if frozen else 2]


@pytest.mark.slow
@pytest.mark.usefixtures("tensor_cores")
@pytest.mark.parametrize("recipe", ["mixed", "rowwise"])
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("traced", [scaled_mm.MAX_ROWS_SCALED_AFTER, scaled_mm.MAX_ROWS_SCALED_AFTER + 1])
def test_either_way_is_right_for_any_size(
    traced: int, frozen: bool, recipe: str, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The traced call chooses for every other."""
    monkeypatch.setattr(scaled_mm, "_SMALL", 0)
    cast, weight = RECIPES[recipe].forward.rhs, torch.randn(48, 64)
    q = quantize(weight, cast, -1)

    def product(a: Tensor, executor: str = "scaled_mm") -> Tensor:
        b = {"b": q.data.t(), "b_scale": q.scale} if frozen else {"b": weight.t()}
        out: Tensor = op(recipe)(a, **b, executor=executor)
        return out

    torch._dynamo.reset()
    compiled = torch.compile(product, backend="aot_eager", fullgraph=True)
    first = torch.randn(traced, 64)
    torch._dynamo.mark_dynamic(first, 0)
    compiled(first)
    ways = [call["scale_a"].dim() for call in calls]
    assert set(ways) == {0 if frozen and traced == scaled_mm.MAX_ROWS_SCALED_AFTER else 2}
    for m in (2, scaled_mm.MAX_ROWS_SCALED_AFTER, scaled_mm.MAX_ROWS_SCALED_AFTER + 1, 300):
        a = torch.randn(m, 64) * torch.logspace(-3, 3, m)[:, None]
        assert error(compiled(a), product(a, "simulated")) <= ROUNDING[torch.float32]
    assert len(calls) == len(ways)  # nothing was traced again


@pytest.mark.usefixtures("tensor_cores")
def test_auto_is_this_executor_where_the_tensor_cores_are(calls: Calls) -> None:
    op("mixed")(torch.randn(3, 64), torch.randn(64, 32))
    assert len(calls) == 1


def test_a_strided_bias_is_copied(calls: Calls) -> None:
    lhs, rhs, bias = (
        quantize(torch.randn(65, 64), TENSOR, 64),
        quantize(torch.randn(32, 64), TENSOR, 64),
        torch.randn(64).bfloat16()[::2],
    )
    out, expected = both(lhs, rhs, 64, torch.bfloat16, bias)
    assert not bias.is_contiguous()
    assert calls[0]["bias"] is not None
    assert sqnr(expected, out) > 40
