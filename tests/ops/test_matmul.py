"""torch.ops.fp8fx.matmul_fp8_*: forward and gradients against the contract written out, what is saved, errors,
autocast."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fp8fx.errors import BlockSizeError, ConfigError, DeviceError, DTypeError, ExecutorError, ShapeError
from fp8fx.ops.matmul import op
from tests.support.contract import (
    CASES,
    E4M3,
    E5M2,
    ROUNDING,
    A,
    B,
    cast,
    cast_blocks,
    dtypes,
    error,
    ladder,
    recipes,
    saved,
)


def cast_rows(x: Tensor) -> Tensor:
    """One scale a row, and E4M3's whole range."""
    return torch.stack([cast(row, E4M3, 448) for row in x])


def contract(
    recipe: str, a: Tensor, b: Tensor, grad: Tensor, bsz: int = -1, bsz2: int = -1
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, grad_a and grad_b for 2-D operands."""
    a, b, grad = a.double(), b.double(), grad.double()
    bsz, bsz2 = ladder(b.shape[0]) if bsz == -1 else bsz, ladder(b.shape[1]) if bsz2 == -1 else bsz2
    if recipe == "rowwise":
        of_a, of_b, of_grad = cast_rows(a), cast_rows(b.T), cast_rows(grad)
        return of_a @ of_b.T, of_grad @ cast_rows(b).T, cast_rows(a.T) @ cast_rows(grad.T).T
    qb = cast(b, E4M3)
    if recipe == "mixed":
        return cast_blocks(a, E4M3, bsz) @ qb, cast_blocks(grad, E5M2, bsz2) @ qb.T, a.T @ grad
    qa, qg = cast(a, E4M3), cast(grad, E5M2)
    return qa @ qb, qg @ qb.T, qa.T @ qg


def assert_contract(recipe: str, a: Tensor, b: Tensor, *, bsz: int = -1, bsz2: int = -1) -> None:
    """Output, all three gradients, their dtypes and shapes."""
    dtype, (k, n) = a.dtype, b.shape
    a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
    bias = torch.randn(n).to(dtype).requires_grad_()
    out = op(recipe)(a, b, bsz, bsz2, bias=bias)
    grad = torch.randn_like(out)
    grads = torch.autograd.grad(out, (a, b, bias), grad)
    rows = grad.reshape(-1, n)
    expected = contract(recipe, a.detach().reshape(-1, k), b.detach(), rows, bsz, bsz2)
    assert (out.dtype, out.shape) == (dtype, (*a.shape[:-1], n))
    assert error(out.reshape(-1, n), expected[0] + bias.double()) <= ROUNDING[dtype]
    for value, of, reference in zip(grads, (a, b, bias), (*expected[1:], rows.double().sum(0)), strict=True):
        assert (value.dtype, value.shape) == (dtype, of.shape)
        assert error(value.reshape(reference.shape), reference) <= ROUNDING[dtype]


@recipes
@dtypes
@pytest.mark.parametrize(("leading", "k", "n", "bsz", "bsz2"), CASES, ids=str)
def test_forward_and_gradients_are_the_contract(
    leading: tuple[int, ...], k: int, n: int, bsz: int, bsz2: int, dtype: torch.dtype, recipe: str
) -> None:
    # Rows of different magnitude: a scale shared with a neighbour would show.
    a = torch.randn(*leading, k) * torch.logspace(-1, 1, math.prod(leading)).reshape(*leading, 1)
    assert_contract(recipe, a.to(dtype), torch.randn(k, n).to(dtype), bsz=bsz, bsz2=bsz2)


A_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda a: a,
    "transposed": lambda a: a.transpose(0, 2).contiguous().transpose(0, 2),
    "every other": lambda a: a.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda a: a[:, :1].expand_as(a),
}
B_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "weight.t()": lambda b: b.t().contiguous().t(),
    "row-major": lambda b: b.contiguous(),
    "a slice": lambda b: torch.cat([b, b], 1)[:, : b.shape[1]],
}


@recipes
@pytest.mark.parametrize("layout_b", B_LAYOUTS)
@pytest.mark.parametrize("layout_a", A_LAYOUTS)
def test_memory_layout_makes_no_difference(layout_a: str, layout_b: str, recipe: str) -> None:
    a, b = A_LAYOUTS[layout_a](torch.randn(2, 3, 100)), B_LAYOUTS[layout_b](torch.randn(100, 50))
    assert a.is_contiguous() == (layout_a == "contiguous")
    assert b.is_contiguous() == (layout_b == "row-major")
    assert_contract(recipe, a, b)


@recipes
@dtypes
def test_no_bias_adds_nothing(dtype: torch.dtype, recipe: str) -> None:
    a, b = torch.randn(5, 100).to(dtype), torch.randn(100, 50).to(dtype)
    assert torch.equal(op(recipe)(a, b), op(recipe)(a, b, bias=torch.zeros(50, dtype=dtype)))


def test_a_rows_result_does_not_depend_on_its_neighbours() -> None:
    a, b = torch.randn(5, 100), torch.randn(100, 50)
    alone = op("mixed")(a[2:3], b)
    a[[1, 3]] *= 1e6
    torch.testing.assert_close(op("mixed")(a, b)[2:3], alone, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("with_bias", [False, True])
@recipes
@pytest.mark.parametrize(
    ("leading", "k", "n"),
    [((0,), 64, 48), ((2, 0), 64, 48), ((5,), 0, 48), ((5,), 64, 0), ((0,), 0, 0), ((), 0, 48), ((2, 3), 64, 0)],
    ids=str,
)
def test_empty_operands_give_what_matmul_gives(
    leading: tuple[int, ...], k: int, n: int, recipe: str, with_bias: bool
) -> None:
    operands = [torch.randn(*leading, k, requires_grad=True), torch.randn(k, n, requires_grad=True)]
    bias = torch.randn(n, requires_grad=True) if with_bias else None
    leaves = operands + ([] if bias is None else [bias])
    out = op(recipe)(*operands, bias=bias)
    expected = torch.matmul(*operands) if bias is None else torch.matmul(*operands) + bias
    grad = torch.randn_like(expected)
    results = out, *torch.autograd.grad(out, leaves, grad)
    for value, reference in zip(results, (expected, *torch.autograd.grad(expected, leaves, grad)), strict=True):
        assert (value.shape, value.dtype) == (reference.shape, reference.dtype)
        assert torch.equal(value, reference)


@recipes
def test_the_weights_gradient_is_laid_out_as_the_weight(recipe: str) -> None:
    a, weight, b = (
        torch.randn(5, 100),
        torch.randn(50, 100, requires_grad=True),
        torch.randn(100, 50, requires_grad=True),
    )
    for of, matrix in ((weight, weight.t()), (b, b)):
        out = op(recipe)(a, matrix)
        assert torch.autograd.grad(out, of, torch.randn_like(out))[0].is_contiguous()


# What is kept for backward.

SCALE = "torch.float32 ()"
# The weight lives anyway. A scale per row of it is none per column, which dgrad needs.
FOR_GRAD_A = {"mixed": ["b", SCALE], "global": ["b", SCALE], "rowwise": ["b"]}
FOR_GRAD_B = {
    "mixed": ["a"],
    "global": ["torch.float8_e4m3fn (100, 5)", SCALE],
    "rowwise": ["torch.float8_e4m3fn (100, 5)", "torch.float32 (100, 1)"],
}


@recipes
@pytest.mark.parametrize(("need_a", "need_b"), [(True, True), (True, False), (False, True), (False, False)])
def test_only_what_backward_reads_is_saved_and_the_input_in_fp8_where_it_can_be(
    recipe: str, need_a: bool, need_b: bool
) -> None:
    kept, grads, full = saved(recipe, need_a, need_b)
    history = ["torch.float32 (0, 100)"] if recipe != "mixed" and need_a and need_b else []
    assert kept == sorted((FOR_GRAD_A[recipe] if need_a else []) + (FOR_GRAD_B[recipe] if need_b else []) + history)
    for need, value, expected in zip((need_a, need_b), grads, full, strict=True):
        assert torch.equal(value, expected) if need else value is None  # type: ignore[arg-type]


@recipes
def test_only_the_bias_needs_a_gradient(recipe: str) -> None:
    bias = torch.randn(50, requires_grad=True)
    op(recipe)(torch.randn(5, 100), torch.randn(100, 50), bias=bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((50,), 5.0))  # type: ignore[arg-type]


@recipes
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_autograd_the_values_are_the_same(mode: Callable[[], Any], recipe: str) -> None:
    a, b = torch.randn(5, 100, requires_grad=True), torch.randn(100, 50, requires_grad=True)
    with mode():
        out = op(recipe)(a, b)
    assert not out.requires_grad
    assert torch.equal(out, op(recipe)(a, b))


@recipes
def test_meta_tensors_give_the_shape(recipe: str) -> None:
    out = op(recipe)(
        torch.ones(2, 3, 100, device="meta"), torch.ones(100, 50, device="meta"), bias=torch.ones(50, device="meta")
    )
    assert (out.device.type, out.shape, out.dtype) == ("meta", (2, 3, 50), torch.float32)


# Errors.

ERRORS: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
    (
        ShapeError,
        r"got a \(\), b \(100, 50\); expected a of at least one dimension and b of two",
        (torch.ones(()), B),
        {},
    ),
    (ShapeError, r"got a \(5, 100\), b \(100,\); expected a of at least", (A, B[:, 0]), {}),
    (ShapeError, r"got a \(5, 100\), b \(1, 100, 50\); expected a of at least", (A, B[None]), {}),
    (
        ShapeError,
        r"a \(5, 100\), b \(50, 100\); a's last dimension 100 and b's first 50 must be equal "
        r"\(pass a weight as weight\.t",
        (A, B.t()),
        {},
    ),
    (ShapeError, r"got bias \(1, 50\) for b \(100, 50\); expected \(50,\)", (A, B), {"bias": torch.ones(1, 50)}),
    (ShapeError, r"got bias \(49,\) for b \(100, 50\); expected \(50,\)", (A, B), {"bias": torch.ones(49)}),
    (
        DTypeError,
        r"got a of torch\.float64; expected float32, float16 or bfloat16 \(cast it with \.to\)",
        (A.double(), B.double()),
        {},
    ),
    (DTypeError, r"got a of torch\.int32; expected float32, float16 or bfloat16", (A.int(), B), {}),
    (DTypeError, r"got b of torch\.int32; expected float32, float16 or bfloat16", (A, B.int()), {}),
    (DTypeError, r"got a of torch\.float8_e4m3fn; expected float32", (A.to(E4M3), B), {}),
    (DTypeError, r"got a of torch\.float32 and b of torch\.bfloat16; expected one dtype", (A, B.bfloat16()), {}),
    (
        DTypeError,
        r"got a of torch\.float32 and bias of torch\.float16; expected one dtype",
        (A, B),
        {"bias": torch.ones(50).half()},
    ),
    (DeviceError, r"got a on cpu and b on meta; move one with \.to", (A, B.to("meta")), {}),
    (
        DeviceError,
        r"got a on cpu and bias on meta; move one with \.to",
        (A, B),
        {"bias": torch.ones(50, device="meta")},
    ),
    (BlockSizeError, r"bsz=100 is not a block size; expected one of \(64, .*4096\), or -1", (A, B, 100), {}),
    (BlockSizeError, r"bsz2=0 is not a block size; expected one of \(64, .*4096\), or -1", (A, B, -1, 0), {}),
    (
        ConfigError,
        r"unknown executor 'simulate'; expected one of auto, .*\. Did you mean 'simulated'",
        (A, B),
        {"executor": "simulate"},
    ),
    (
        ExecutorError,
        r"'scaled_mm' needs a CUDA device .* found device cpu; use executor='simulated'",
        (A, B),
        {"executor": "scaled_mm"},
    ),
]


@recipes
@pytest.mark.parametrize(
    ("kind", "message", "args", "kwargs"), ERRORS, ids=[f"{kind.__name__}-{i}" for i, (kind, *_) in enumerate(ERRORS)]
)
def test_errors(
    kind: type[Exception], message: str, args: tuple[Any, ...], kwargs: dict[str, Any], recipe: str
) -> None:
    with pytest.raises(kind, match=message) as error:
        op(recipe)(*args, **kwargs)
    if kind in (ShapeError, DTypeError, DeviceError):
        assert str(error.value).startswith(f"matmul_fp8_{recipe} got ")


# Non-finite values.


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_mixed_keeps_a_non_finite_value_in_its_row(value: float) -> None:
    b = torch.randn(100, 50)

    def run(a: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        a = a.clone().requires_grad_()
        out = op("mixed")(a, b)
        return out.detach(), torch.autograd.grad(out, a, grad)[0]

    a, grad = torch.randn(5, 100), torch.randn(5, 50)
    clean = run(a, grad)
    a[1, 3] = grad[3, 7] = value
    for result, expected, row in zip(run(a, grad), clean, (1, 3), strict=True):
        others = [i for i in range(5) if i != row]
        assert not result[row].isfinite().any()
        assert torch.equal(result[others], expected[others])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize(("recipe", "operand"), [("global", 0), ("global", 1), ("mixed", 1)])
def test_a_non_finite_value_under_the_only_scale_spoils_everything(recipe: str, operand: int, value: float) -> None:
    operands = [torch.randn(5, 100), torch.randn(100, 50)]
    operands[operand][2, 3] = value
    assert not op(recipe)(*operands).isfinite().any()


@recipes
def test_zeros_give_zeros(recipe: str) -> None:
    a, b = torch.zeros(5, 100, requires_grad=True), torch.randn(100, 50, requires_grad=True)
    out = op(recipe)(a, b)
    grads = torch.autograd.grad(out, (a, b), torch.zeros(5, 50))
    assert all((x == 0).all() for x in (out, *grads))


# Autocast.


@recipes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_the_operands_as_a_linear_does(dtype: torch.dtype, recipe: str) -> None:
    operands = torch.randn(5, 100), torch.randn(100, 50), torch.randn(50)
    leaves = [x.clone().requires_grad_() for x in operands]
    with torch.autocast("cpu", dtype=dtype):
        out = op(recipe)(*leaves[:2], bias=leaves[2])
    cast_leaves = [x.to(dtype).requires_grad_() for x in operands]
    expected = op(recipe)(*cast_leaves[:2], bias=cast_leaves[2])
    assert out.dtype == dtype
    assert torch.equal(out, expected)
    grad = torch.randn(5, 50).to(dtype)
    for x, y in zip(
        torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, cast_leaves, grad), strict=True
    ):
        assert x.dtype == torch.float32
        assert torch.equal(x, y.float())


def test_autocast_brings_two_dtypes_together_and_leaves_float64() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(op("mixed")(A.bfloat16(), B), op("mixed")(A.bfloat16(), B.bfloat16()))
        with pytest.raises(DTypeError, match=r"got a of torch\.float64"):
            op("mixed")(A.double(), B.double())


@recipes
@dtypes
@pytest.mark.parametrize(
    "fp8", [(), ("forward",), ("dgrad",), ("wgrad",), ("forward", "wgrad"), ("dgrad", "wgrad")], ids="-".join
)
def test_each_gemm_can_be_left_in_high_precision(fp8: tuple[str, ...], dtype: torch.dtype, recipe: str) -> None:
    a, b, bias, grad = (torch.randn(*shape).to(dtype) for shape in ((20, 100), (100, 50), (50,), (20, 50)))
    leaves = [x.clone().requires_grad_() for x in (a, b, bias)]
    out = op(recipe)(*leaves[:2], bias=leaves[2], **{name: name in fp8 for name in ("forward", "dgrad", "wgrad")})
    values = out, *torch.autograd.grad(out, leaves, grad)
    quantized = contract(recipe, a, b, grad)
    exact = a.double() @ b.double(), grad.double() @ b.double().T, a.double().T @ grad.double()
    for i, name in enumerate(("forward", "dgrad", "wgrad")):
        expected = (quantized if name in fp8 else exact)[i] + (bias.double() if i == 0 else 0)
        assert error(values[i], expected) <= ROUNDING[dtype]
    assert error(values[3], grad.double().sum(0)) <= ROUNDING[dtype]
