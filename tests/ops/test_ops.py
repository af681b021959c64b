"""torch.ops.fp8fx.*: forward and gradients against the contract written out, errors, autocast, and every way to trace them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

from fp8fx.errors import (
    BlockSizeError,
    ConfigError,
    DeviceError,
    DifferentiationError,
    DTypeError,
    ExecutorError,
    ShapeError,
)
from fp8fx.executors import hardware
from fp8fx.ops.matmul import op
from fp8fx.ops.operands import DTYPES
from fp8fx.recipes.quantize import quantize
from fp8fx.recipes.recipe import RECIPES as DEFINITIONS

RECIPES = ("mixed", "global", "rowwise")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# Rounding to the dtype, of operands and of the result.
ROUNDING = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
recipes = pytest.mark.parametrize("recipe", RECIPES)
Grads = tuple[Tensor | None, ...]


# The contract's table, in plain torch and float64.


def cast(x: Tensor, dtype: torch.dtype, target: int | None = None) -> Tensor:
    """`x` after a trip through FP8 with one scale: amax goes to 240 (E4M3) or 57344 (E5M2)."""
    scale = (x.abs().max() / (target or {E4M3: 240, E5M2: 57344}[dtype])).float()
    # 16-bit values often lie between two grid points: the product is rounded to float32 first, which breaks the tie.
    return (x.float() * (1 / scale.double()).float()).to(dtype).double() * scale


def cast_blocks(x: Tensor, dtype: torch.dtype, size: int) -> Tensor:
    """The same with one scale per block of a row; 4096 is the whole row."""
    pieces = x.split(x.shape[1] if size == 4096 else size, dim=1)
    return torch.cat([torch.stack([cast(row, dtype) for row in piece]) for piece in pieces], dim=1)


def cast_rows(x: Tensor) -> Tensor:
    """One scale a row, and E4M3's whole range."""
    return torch.stack([cast(row, E4M3, 448) for row in x])


def ladder(features: int) -> int:
    return min(max(64, 2 ** math.ceil(math.log2(features))), 4096)


def contract(recipe: str, a: Tensor, b: Tensor, grad: Tensor, bsz: int = -1, bsz2: int = -1) -> tuple[Tensor, Tensor, Tensor]:
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


def error(x: Tensor, reference: Tensor) -> float:
    x, reference = x.detach().double(), reference.detach().double()
    return float((x - reference).norm() / reference.norm())


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


CASES = [  # leading dimensions, K, N, bsz, bsz2
    ((), 64, 64, -1, -1),
    ((5,), 64, 48, -1, -1),
    ((2, 3), 100, 50, -1, -1),
    ((2, 1, 3), 33, 17, -1, -1),
    ((1,), 1, 1, -1, -1),
    ((4,), 5000, 20, -1, -1),
    ((3,), 20, 4100, -1, -1),
    ((5,), 200, 150, 64, 64),
    ((5,), 96, 300, 64, 128),
    ((2,), 5000, 20, 2048, -1),
    ((5,), 100, 50, 4096, 512),
]


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
def test_empty_operands_give_what_matmul_gives(leading: tuple[int, ...], k: int, n: int, recipe: str, with_bias: bool) -> None:
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
    a, weight, b = torch.randn(5, 100), torch.randn(50, 100, requires_grad=True), torch.randn(100, 50, requires_grad=True)
    for of, matrix in ((weight, weight.t()), (b, b)):
        out = op(recipe)(a, matrix)
        assert torch.autograd.grad(out, of, torch.randn_like(out))[0].is_contiguous()


# What is kept for backward.


def saved(recipe: str, need_a: bool, need_b: bool) -> tuple[list[str], Grads, Grads]:
    """What is saved when only some operands need a gradient; their gradients, and those of a run where both do."""
    operands, grad = {"a": torch.randn(5, 100), "b": torch.randn(100, 50)}, torch.randn(5, 50)
    pointers = {x.data_ptr(): name for name, x in operands.items()}
    kept: list[str] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(pointers.get(x.data_ptr(), f"{x.dtype} {tuple(x.shape)}"))
        return x

    def grads(*need: bool) -> Grads:
        leaves = [x.detach().requires_grad_(n) for x, n in zip(operands.values(), need, strict=True)]
        out = op(recipe)(*leaves)
        assert out.requires_grad == any(need)
        if any(need):
            out.backward(grad)
        return tuple(x.grad for x in leaves)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        some = grads(need_a, need_b)
    return sorted(kept), some, grads(True, True)


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
def test_only_what_backward_reads_is_saved_and_the_input_in_fp8_where_it_can_be(recipe: str, need_a: bool, need_b: bool) -> None:
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
    out = op(recipe)(torch.ones(2, 3, 100, device="meta"), torch.ones(100, 50, device="meta"), bias=torch.ones(50, device="meta"))
    assert (out.device.type, out.shape, out.dtype) == ("meta", (2, 3, 50), torch.float32)


# Errors.

A, B = torch.ones(5, 100), torch.ones(100, 50)
ERRORS: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
    (ShapeError, r"got a \(\), b \(100, 50\); expected a of at least one dimension and b of two", (torch.ones(()), B), {}),
    (ShapeError, r"got a \(5, 100\), b \(100,\); expected a of at least", (A, B[:, 0]), {}),
    (ShapeError, r"got a \(5, 100\), b \(1, 100, 50\); expected a of at least", (A, B[None]), {}),
    (
        ShapeError,
        r"a \(5, 100\), b \(50, 100\); a's last dimension 100 and b's first 50 must be equal \(pass a weight as weight\.t",
        (A, B.t()),
        {},
    ),
    (ShapeError, r"got bias \(1, 50\) for b \(100, 50\); expected \(50,\)", (A, B), {"bias": torch.ones(1, 50)}),
    (ShapeError, r"got bias \(49,\) for b \(100, 50\); expected \(50,\)", (A, B), {"bias": torch.ones(49)}),
    (DTypeError, r"got a of torch\.float64; expected float32, float16 or bfloat16 \(cast it with \.to\)", (A.double(), B.double()), {}),
    (DTypeError, r"got a of torch\.int32; expected float32, float16 or bfloat16", (A.int(), B), {}),
    (DTypeError, r"got b of torch\.int32; expected float32, float16 or bfloat16", (A, B.int()), {}),
    (DTypeError, r"got a of torch\.float8_e4m3fn; expected float32", (A.to(E4M3), B), {}),
    (DTypeError, r"got a of torch\.float32 and b of torch\.bfloat16; expected one dtype", (A, B.bfloat16()), {}),
    (DTypeError, r"got a of torch\.float32 and bias of torch\.float16; expected one dtype", (A, B), {"bias": torch.ones(50).half()}),
    (DeviceError, r"got a on cpu and b on meta; move one with \.to", (A, B.to("meta")), {}),
    (DeviceError, r"got a on cpu and bias on meta; move one with \.to", (A, B), {"bias": torch.ones(50, device="meta")}),
    (BlockSizeError, r"bsz=100 is not a block size; expected one of \(64, .*4096\), or -1", (A, B, 100), {}),
    (BlockSizeError, r"bsz2=0 is not a block size; expected one of \(64, .*4096\), or -1", (A, B, -1, 0), {}),
    (ConfigError, r"unknown executor 'simulate'; expected one of auto, .*\. Did you mean 'simulated'", (A, B), {"executor": "simulate"}),
    (ExecutorError, r"'scaled_mm' needs a CUDA device .* found device cpu; use executor='simulated'", (A, B), {"executor": "scaled_mm"}),
]


@recipes
@pytest.mark.parametrize(("kind", "message", "args", "kwargs"), ERRORS, ids=[f"{kind.__name__}-{i}" for i, (kind, *_) in enumerate(ERRORS)])
def test_errors(kind: type[Exception], message: str, args: tuple[Any, ...], kwargs: dict[str, Any], recipe: str) -> None:
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
    for x, y in zip(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, cast_leaves, grad), strict=True):
        assert x.dtype == torch.float32
        assert torch.equal(x, y.float())


def test_autocast_brings_two_dtypes_together_and_leaves_float64() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(op("mixed")(A.bfloat16(), B), op("mixed")(A.bfloat16(), B.bfloat16()))
        with pytest.raises(DTypeError, match=r"got a of torch\.float64"):
            op("mixed")(A.double(), B.double())


# Tracing.


def step(a: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Both ops, as a model would call them."""
    return (
        torch.ops.fp8fx.matmul_fp8_mixed(a, weight.t(), bias=bias),
        torch.ops.fp8fx.matmul_fp8_global(torch.relu(a), weight.t()),
    )


def train(f: Callable[..., tuple[Tensor, ...]], operands: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> list[Tensor]:
    """Outputs and gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in operands]
    outs = f(*leaves)
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, grads)]


def integers(largest: int, *shape: int) -> Tensor:
    """Whole numbers whose first column holds `largest`."""
    x = torch.randint(-largest, largest + 1, shape).float()
    x[..., 0] = largest
    return x


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_is_eager(backend: str, dynamic: bool) -> None:
    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=dynamic)
    # Scales of 1 and 2**-13 and sums below 2**24: exact in any order, so that only another FP8 value could make a difference.
    exact = (integers(240, 6, 100), integers(240, 50, 100), integers(9, 50)), (integers(7, 6, 50), integers(7, 6, 50))
    for value, expected in zip(train(compiled, *exact), train(step, *exact), strict=True):
        assert torch.equal(value, expected)
    # Any numbers: Inductor may lay a GEMM's operand out differently, and BLAS then sums in another order.
    anything = (torch.randn(6, 100), torch.randn(50, 100), torch.randn(50)), (torch.randn(6, 50), torch.randn(6, 50))
    for value, expected in zip(train(compiled, *anything), train(step, *anything), strict=True):
        assert (value.dtype, value.shape) == (expected.dtype, expected.shape)
        assert error(value, expected) <= (0 if backend == "aot_eager" else 3e-7)


def compilations(backend: str, executor: str, training: bool) -> int:
    """How often the op is compiled for batches of varying size."""
    counter = CompileCounterWithBackend(backend)

    def f(a: Tensor, b: Tensor) -> Tensor:
        out: Tensor = torch.ops.fp8fx.matmul_fp8_global(a, b, executor=executor)
        # Before torch 2.13 the CPU's _scaled_mm takes no scale per row.
        return out if executor == "scaled_mm" else out + torch.ops.fp8fx.matmul_fp8_mixed(a, b, executor=executor)

    torch._dynamo.reset()
    compiled, b = torch.compile(f, backend=counter, fullgraph=True), torch.randn(40, 24, requires_grad=training)
    for m in (16, 17, 18, 33, 32, 31, 200, 1, 0):  # padding to 16 by nothing, by one and by more: one graph for all
        out = compiled(torch.randn(m, 40, requires_grad=training), b)
        assert out.shape == (m, 24)
        if training:
            out.sum().backward()
    return int(counter.frame_count)


@pytest.fixture
def tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the executor scaled_mm run on the CPU."""
    monkeypatch.setattr(hardware, "has_fp8_tensor_cores", lambda device: True)


@pytest.mark.usefixtures("tensor_cores")
@pytest.mark.parametrize("executor", ["simulated", "scaled_mm"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_a_varying_batch_is_compiled_no_more_often_than_any_op(training: bool, executor: str) -> None:
    assert compilations("aot_eager", executor, training) == compilations("eager", executor, training)


@recipes
def test_a_batch_known_only_at_run_time(recipe: str) -> None:
    def f(a: Tensor, chosen: Tensor, b: Tensor) -> Tensor:
        out: Tensor = op(recipe)(a[chosen], b)
        return out

    a, b = torch.randn(6, 100), torch.randn(100, 50, requires_grad=True)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
        for rows in (3, 1, 0):  # an expert that no token was routed to
            chosen = torch.arange(6) < rows
            results = [(out := g(a, chosen, b), *torch.autograd.grad(out.sum(), b)) for g in (compiled, f)]
            assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def fp8fx_calls(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if "fp8fx" in str(node.target)]


@recipes
@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_make_fx_opens_it(tracing_mode: str, recipe: str) -> None:
    a, b = torch.randn(5, 100), torch.randn(100, 50)
    graph = make_fx(op(recipe), tracing_mode=tracing_mode)(a, b)
    assert fp8fx_calls(graph.graph) == []
    assert any(torch.float8_e4m3fn in node.kwargs.values() for node in graph.graph.nodes)
    assert torch.equal(graph(a, b), op(recipe)(a, b))


class Model(nn.Module):
    def __init__(self, recipe: str) -> None:
        super().__init__()
        self.recipe = recipe
        self.weight = nn.Parameter(torch.randn(50, 100))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = op(self.recipe)(x, self.weight.t())
        return out


@recipes
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_export_keeps_one_node_and_decompositions_open_it(dynamic: bool, recipe: str) -> None:
    model, a = Model(recipe), torch.randn(5, 100)
    exported = torch.export.export(model, (a,), dynamic_shapes=({0: torch.export.Dim("m")},) if dynamic else None)
    assert fp8fx_calls(exported.graph) == [f"fp8fx.matmul_fp8_{recipe}.default"]
    opened = exported.run_decompositions()
    assert fp8fx_calls(opened.graph) == []
    for x in (a, torch.randn(9, 100)) if dynamic else (a,):
        assert torch.equal(exported.module()(x), model(x))
        assert torch.equal(opened.module()(x), model(x))


@pytest.mark.usefixtures("tensor_cores")
@recipes
def test_export_opens_it_to_scaled_mm_of_any_batch(recipe: str) -> None:
    # Whatever fixed M would raise here.
    exported = torch.export.export(Model(recipe), (torch.randn(5, 100),), dynamic_shapes=({0: torch.export.Dim("m")},))
    products = [node for node in exported.run_decompositions().graph.nodes if node.target is torch.ops.aten._scaled_mm.default]
    assert len(products) == 1
    m, n = products[0].meta["val"].shape
    assert not isinstance(m, int)
    assert n == 64  # 50, aligned


@recipes
@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck(recipe: str, with_bias: bool) -> None:
    a, b, bias = torch.randn(2, 3, 100, requires_grad=True), torch.randn(100, 50, requires_grad=True), torch.randn(50, requires_grad=True)
    # Without test_schema: it compares the float8 intermediates with allclose, which multiplies them, and float8 has no mul kernel on the
    # CPU. The three tests below check the schema instead.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    results = torch.library.opcheck(op(recipe), (a, b), {"bias": bias if with_bias else None}, test_utils=checks)
    assert results == dict.fromkeys(checks, "SUCCESS")


@recipes
@dtypes
@pytest.mark.parametrize("fp8", [(), ("forward",), ("dgrad",), ("wgrad",), ("forward", "wgrad"), ("dgrad", "wgrad")], ids="-".join)
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


@recipes
def test_schema_is_the_contract(recipe: str) -> None:
    arguments = 'Tensor a, Tensor b, int bsz=-1, int bsz2=-1, *, Tensor? bias=None, str executor="auto"'
    gemms, frozen = "bool forward=True, bool dgrad=True, bool wgrad=True", "Tensor? b_scale=None, bool weight_only=False"
    assert str(op(recipe)._schema) == f"fp8fx::matmul_fp8_{recipe}({arguments}, {gemms}, {frozen}) -> Tensor"
    assert torch.Tag.pt2_compliant_tag in op(recipe).tags


SCHEMA_SHAPES = [(5, 100, 50), (16, 64, 64), (0, 64, 48), (5, 0, 48)]


@recipes
@pytest.mark.parametrize("shape", SCHEMA_SHAPES, ids=str)
def test_inputs_are_not_mutated(shape: tuple[int, int, int], recipe: str) -> None:
    m, k, n = shape
    operands = [torch.randn(m, k, requires_grad=True), torch.randn(k, n, requires_grad=True), torch.randn(n, requires_grad=True)]
    before, versions = [x.detach().clone() for x in operands], [x._version for x in operands]
    op(recipe)(*operands[:2], bias=operands[2]).sum().backward()
    assert [x._version for x in operands] == versions
    assert all(torch.equal(x, y) for x, y in zip(operands, before, strict=True))


@recipes
@pytest.mark.parametrize("shape", SCHEMA_SHAPES, ids=str)
def test_the_output_aliases_no_input(shape: tuple[int, int, int], recipe: str) -> None:
    m, k, n = shape
    operands = [torch.randn(m, k), torch.randn(k, n), torch.randn(n)]
    storages = {x.untyped_storage()._cdata for x in operands}
    for bias in (None, operands[2]):
        assert op(recipe)(*operands[:2], bias=bias).untyped_storage()._cdata not in storages


# A weight that is FP8 already.


def frozen_weight(recipe: str, b: Tensor) -> dict[str, Tensor]:
    """b (K, N) as the recipe's forward has it: data and scale."""
    forward = DEFINITIONS[recipe].forward
    assert forward is not None
    data, scale = quantize(b.t(), forward.rhs, 4096)
    assert scale is not None
    return {"b": data.contiguous().t(), "b_scale": scale}


@recipes
@dtypes
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("leading", "k", "n", "bsz", "bsz2"), CASES, ids=str)
def test_a_frozen_weight_gives_the_same_bits(
    leading: tuple[int, ...], k: int, n: int, bsz: int, bsz2: int, with_bias: bool, dtype: torch.dtype, recipe: str
) -> None:
    a, b, bias = torch.randn(*leading, k).to(dtype), torch.randn(n, k).to(dtype).t(), torch.randn(n).to(dtype) if with_bias else None
    out = op(recipe)(a, bsz=bsz, bsz2=bsz2, bias=bias, **frozen_weight(recipe, b))
    assert torch.equal(out, op(recipe)(a, b, bsz, bsz2, bias=bias))


def frozen_gradients(recipe: str, weight: Tensor, scale: Tensor, grad: Tensor, bsz2: int = -1) -> Tensor:
    """a's gradient by the contract, of the FP8 values: a scale a row of the weight is none of its columns, so rowwise stays exact."""
    values, grad = weight.double() * (scale.double().t() if scale.dim() else scale.double()), grad.double()
    if recipe == "rowwise":
        return grad @ values.T
    quantized = cast(grad, E5M2) if recipe == "global" else cast_blocks(grad, E5M2, ladder(weight.shape[1]) if bsz2 == -1 else bsz2)
    return quantized @ values.T


@recipes
@dtypes
@pytest.mark.parametrize(("leading", "k", "n", "bsz", "bsz2"), CASES, ids=str)
def test_gradients_with_a_frozen_weight_are_the_contract(
    leading: tuple[int, ...], k: int, n: int, bsz: int, bsz2: int, dtype: torch.dtype, recipe: str
) -> None:
    a, bias = torch.randn(*leading, k).to(dtype).requires_grad_(), torch.randn(n).to(dtype).requires_grad_()
    frozen = frozen_weight(recipe, torch.randn(k, n).to(dtype))
    out = op(recipe)(a, bsz=bsz, bsz2=bsz2, bias=bias, **frozen)
    grad = torch.randn_like(out)
    grad_a, grad_bias = torch.autograd.grad(out, (a, bias), grad)
    rows = grad.reshape(-1, n)
    expected = frozen_gradients(recipe, frozen["b"], frozen["b_scale"], rows, bsz2)
    assert (grad_a.dtype, grad_a.shape, grad_bias.dtype, grad_bias.shape) == (dtype, a.shape, dtype, bias.shape)
    assert error(grad_a.reshape(-1, k), expected) <= ROUNDING[dtype]
    assert error(grad_bias, rows.double().sum(0)) <= ROUNDING[dtype]


@recipes
def test_a_gradient_in_high_precision_reads_the_frozen_values(recipe: str) -> None:
    a, grad, frozen = torch.randn(5, 100, requires_grad=True), torch.randn(5, 50), frozen_weight(recipe, torch.randn(100, 50))
    (value,) = torch.autograd.grad(op(recipe)(a, dgrad=False, **frozen), a, grad)
    assert error(value, frozen_gradients("rowwise", frozen["b"], frozen["b_scale"], grad)) <= ROUNDING[torch.float32]


@recipes
@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)], ids=["a", "bias", "neither"])
def test_only_the_gradients_asked_for(wanted: tuple[bool, bool], recipe: str) -> None:
    a, bias = (x.requires_grad_(need) for x, need in zip((torch.randn(5, 100), torch.randn(50)), wanted, strict=True))
    out = op(recipe)(a, bias=bias, **frozen_weight(recipe, torch.randn(100, 50)))
    assert out.requires_grad == any(wanted)
    if any(wanted):
        out.sum().backward()
    assert [x.grad is not None for x in (a, bias)] == list(wanted)


@recipes
def test_the_frozen_weight_itself_is_all_that_is_saved(recipe: str) -> None:
    a, frozen = torch.randn(5, 100, requires_grad=True), frozen_weight(recipe, torch.randn(100, 50))
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.data_ptr()) or x, lambda x: x):  # type: ignore[func-returns-value]
        op(recipe)(a, **frozen)
    assert sorted(saved) == sorted(x.data_ptr() for x in frozen.values())


@recipes
@pytest.mark.parametrize("of", ["a", "grad"])
def test_a_gradient_through_a_frozen_weight_is_not_differentiated_again(of: str, recipe: str) -> None:
    a, frozen = torch.randn(5, 100, requires_grad=True), frozen_weight(recipe, torch.randn(100, 50))
    grad = torch.randn(5, 50, requires_grad=True)
    out = op(recipe)(torch.relu(a), **frozen)
    (first,) = torch.autograd.grad(out, a, grad if of == "grad" else 2 * out, create_graph=True)
    with pytest.raises(DifferentiationError, match=rf"a gradient of matmul_fp8_{recipe} was differentiated again"):
        torch.autograd.grad(first.square().sum(), a if of == "a" else grad)


FP8_B = torch.ones(100, 50).to(E4M3)
TENSOR_SCALE, ROW_SCALE = torch.ones(()), torch.ones(50, 1)
FROZEN_ERRORS: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (ConfigError, r"got weight_only=True and no b_scale; it is for a weight that is FP8 already", {"b": B, "weight_only": True}),
    (
        ConfigError,
        r"got a b_scale and a forward in high precision; leave b_scale out, or forward=True",
        {"b_scale": TENSOR_SCALE, "forward": False},
    ),
    (DTypeError, r"got b of torch\.float32 with a b_scale; expected b as torch\.float8_e4m3fn", {"b": B, "b_scale": TENSOR_SCALE}),
    (DTypeError, r"got b of torch\.float8_e5m2 with a b_scale; expected b as torch\.float8_e4m3fn", {"b": FP8_B.to(E5M2)}),
    (DTypeError, r"got b_scale of torch\.float64; expected torch\.float32", {"b_scale": TENSOR_SCALE.double()}),
    (DTypeError, r"got b_scale of torch\.bfloat16; expected torch\.float32", {"b_scale": ROW_SCALE.bfloat16()}),
    (ShapeError, r"got b_scale \(50,\); expected \(.*\) for b \(100, 50\)", {"b_scale": torch.ones(50)}),
    (ShapeError, r"got b_scale \(1, 50\); expected \(.*\) for b \(100, 50\)", {"b_scale": torch.ones(1, 50)}),
    (ShapeError, r"got b_scale \(1, 1\); expected \(.*\) for b \(100, 50\)", {"b_scale": torch.ones(1, 1)}),
    (ShapeError, r"got b_scale \(50, 2\); expected \(.*\) for b \(100, 50\)", {"b_scale": torch.ones(50, 2)}),
    (DeviceError, r"got b on cpu and b_scale on meta; move one with \.to", {"b_scale": "meta"}),
    (DeviceError, r"got a on cpu and b on meta; move one with \.to", {"b": FP8_B.to("meta"), "b_scale": "meta"}),
    (ExecutorError, r"got a b_scale; executor 'bitsandbytes' keeps no FP8 weights", {"executor": "bitsandbytes"}),
    (ShapeError, r"a's last dimension 100 and b's first 50 must be equal", {"b": FP8_B.t()}),
    (ShapeError, r"got bias \(49,\) for b \(100, 50\); expected \(50,\)", {"bias": torch.ones(49)}),
    (DTypeError, r"got a of torch\.float8_e4m3fn; expected float32", {"a": A.to(E4M3)}),
    (DTypeError, r"got a of torch\.float64; expected float32", {"a": A.double()}),
    (DTypeError, r"got a of torch\.float32 and bias of torch\.float16; expected one dtype", {"bias": torch.ones(50).half()}),
    (DTypeError, r"got b of torch\.float8_e4m3fn; expected float32", {"b_scale": None}),
]


@recipes
@pytest.mark.parametrize(
    ("kind", "message", "given"), FROZEN_ERRORS, ids=[f"{kind.__name__}-{i}" for i, (kind, *_) in enumerate(FROZEN_ERRORS)]
)
def test_errors_of_a_frozen_weight(kind: type[Exception], message: str, given: dict[str, Any], recipe: str) -> None:
    scale = ROW_SCALE if recipe == "rowwise" else TENSOR_SCALE
    arguments = {"a": A, "b": FP8_B, "b_scale": scale, **given}
    if given.get("b_scale") == "meta":
        arguments["b_scale"] = scale.to("meta")
    if "weight_only" in given:
        del arguments["b_scale"]
    with pytest.raises(kind, match=message) as caught:
        op(recipe)(**arguments)
    assert str(caught.value).startswith(f"matmul_fp8_{recipe} got ")


@pytest.mark.parametrize(
    ("recipe", "scale", "expected"),
    [("global", ROW_SCALE, "()"), ("rowwise", TENSOR_SCALE, "(50, 1)"), ("mixed", torch.ones(49, 1), "() or (50, 1)")],
)
def test_another_recipes_scale_is_refused(recipe: str, scale: Tensor, expected: str) -> None:
    with pytest.raises(ShapeError, match=rf"expected {re.escape(expected)} for b"):
        op(recipe)(A, FP8_B, b_scale=scale)


@dtypes
@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize("weight_only", [False, True])
def test_a_scale_per_tensor_may_be_spread_over_the_rows(weight_only: bool, rows: int, dtype: torch.dtype) -> None:
    a, grad = torch.randn(rows, 100).to(dtype).requires_grad_(), torch.randn(rows, 50).to(dtype)
    frozen = frozen_weight("mixed", torch.randn(100, 50))
    found = []
    for scale in (frozen["b_scale"], frozen["b_scale"].expand(50, 1).contiguous()):
        out = op("mixed")(a, frozen["b"], b_scale=scale, weight_only=weight_only)
        found.append((out, *torch.autograd.grad(out, a, grad)))
    assert frozen["b_scale"].shape == () and all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@recipes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_leaves_a_frozen_weight_alone(dtype: torch.dtype, recipe: str) -> None:
    a, bias, frozen = torch.randn(5, 100), torch.randn(50), frozen_weight(recipe, torch.randn(100, 50))
    with torch.autocast("cpu", dtype=dtype):
        out = op(recipe)(a, bias=bias, **frozen)
    assert torch.equal(out, op(recipe)(a.to(dtype), bias=bias.to(dtype), **frozen))


@recipes
@dtypes
@pytest.mark.parametrize("weight_only", [False, True])
@pytest.mark.parametrize(("leading", "k", "n"), [((0,), 64, 48), ((2, 0), 64, 48), ((5,), 64, 0), ((5,), 0, 48), ((1,), 0, 48)], ids=str)
def test_empty_operands_with_a_frozen_weight(
    leading: tuple[int, ...], k: int, n: int, weight_only: bool, dtype: torch.dtype, recipe: str
) -> None:
    scale = torch.ones(n, 1) if recipe == "rowwise" else torch.ones(())
    a, bias = torch.randn(*leading, k).to(dtype).requires_grad_(), torch.randn(n).to(dtype).requires_grad_()
    out = op(recipe)(a, torch.zeros(n, k).to(E4M3).t(), bias=bias, b_scale=scale, weight_only=weight_only)
    assert (out.dtype, out.shape) == (dtype, (*leading, n))
    assert torch.equal(out, bias.expand(*leading, n))
    grad_a, grad_bias = torch.autograd.grad(out, (a, bias), torch.ones_like(out))
    assert torch.equal(grad_a, torch.zeros_like(a))
    assert torch.equal(grad_bias, torch.full((n,), float(math.prod(leading)), dtype=dtype))


# A single row that is not quantized.


def ways(recipe: str, a: Tensor, frozen: dict[str, Tensor], bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What a frozen weight gives with an `a` as it is, in float64, and with a quantized one."""
    scale = frozen["b_scale"].double()
    exact = a.double() @ (frozen["b"].double() * (scale.t() if scale.dim() else scale))
    return exact if bias is None else exact + bias.double(), op(recipe)(a, bias=bias, **frozen)


@recipes
@dtypes
@pytest.mark.parametrize("leading", [(1,), (1, 1), (), (1, 1, 1)], ids=str)
def test_a_single_row_stays_as_it_is(leading: tuple[int, ...], dtype: torch.dtype, recipe: str) -> None:
    a, bias, frozen = torch.randn(*leading, 100).to(dtype), torch.randn(50).to(dtype), frozen_weight(recipe, torch.randn(100, 50))
    out = op(recipe)(a, bias=bias, weight_only=True, **frozen)
    exact, quantized = ways(recipe, a, frozen, bias)
    assert (out.dtype, out.shape) == (dtype, (*leading, 50))
    assert error(out, exact) <= 2 * ROUNDING[dtype]  # the simulation rounds the weight to the dtype too
    assert error(quantized, exact) > 3 * ROUNDING[dtype]


@recipes
@pytest.mark.parametrize("leading", [(2,), (1, 2), (2, 1), (5,), (64,)], ids=str)
def test_several_rows_are_quantized_whatever_weight_only_says(leading: tuple[int, ...], recipe: str) -> None:
    a, frozen = torch.randn(*leading, 100), frozen_weight(recipe, torch.randn(100, 50))
    assert torch.equal(op(recipe)(a, weight_only=True, **frozen), op(recipe)(a, **frozen))


@recipes
def test_a_single_rows_gradient_is_that_of_the_quantized_one(recipe: str) -> None:
    a, bias, grad = torch.randn(1, 100, requires_grad=True), torch.randn(50, requires_grad=True), torch.randn(1, 50)
    frozen = frozen_weight(recipe, torch.randn(100, 50))
    results = [torch.autograd.grad(op(recipe)(a, bias=bias, weight_only=way, **frozen), (a, bias), grad) for way in (True, False)]
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@recipes
def test_a_row_that_is_not_finite_keeps_its_values(recipe: str) -> None:
    a, frozen = torch.ones(1, 100), frozen_weight(recipe, torch.ones(100, 50))
    a[0, 3] = math.inf
    assert torch.equal(op(recipe)(a, weight_only=True, **frozen), torch.full((1, 50), math.inf))


BACKENDS = [("mixed", "aot_eager"), ("global", "aot_eager"), ("rowwise", "aot_eager"), ("rowwise", "inductor")]


@pytest.mark.parametrize(("recipe", "backend"), BACKENDS)
def test_whether_a_row_is_alone_is_found_for_each_shape(backend: str, recipe: str) -> None:
    frozen = frozen_weight(recipe, torch.randn(100, 50))
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(lambda a: op(recipe)(a, weight_only=True, **frozen), backend=counter, fullgraph=True, dynamic=True)
    for m in (7, 2, 3, 1, 4, 5, 9, 1, 0):
        a = torch.randn(m, 100)
        exact, quantized = ways(recipe, a, frozen)
        torch.testing.assert_close(compiled(a), exact.float() if m == 1 else quantized, rtol=1e-5, atol=1e-4)
    assert counter.frame_count <= 3  # one row, none, and any other number


@pytest.mark.parametrize(("recipe", "backend"), BACKENDS)
def test_a_number_of_rows_known_only_at_run_time_chooses_then(backend: str, recipe: str) -> None:
    frozen, bias = frozen_weight(recipe, torch.randn(100, 50)), torch.randn(50)
    counter = CompileCounterWithBackend(backend)

    def f(a: Tensor, chosen: Tensor) -> Tensor:
        out: Tensor = op(recipe)(a[chosen], bias=bias, weight_only=True, **frozen)
        return out

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True), torch.no_grad():
        compiled = torch.compile(f, backend=counter, fullgraph=True)
        for rows in (3, 1, 2, 6, 1):
            a, chosen = torch.randn(6, 100), torch.arange(6) < rows
            exact, quantized = ways(recipe, a[chosen], frozen, bias)
            torch.testing.assert_close(compiled(a, chosen), exact.float() if rows == 1 else quantized, rtol=1e-5, atol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_row_known_only_at_run_time_has_its_gradient(with_bias: bool) -> None:
    frozen, bias = frozen_weight("mixed", torch.randn(100, 50)), torch.randn(50, requires_grad=True) if with_bias else None

    def f(a: Tensor, chosen: Tensor) -> Tensor:
        out: Tensor = op("mixed")(a[chosen], bias=bias, weight_only=True, **frozen)
        return out

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
        for rows in (3, 1):
            a, chosen = torch.randn(6, 100, requires_grad=True), torch.arange(6) < rows
            leaves = (a,) if bias is None else (a, bias)
            results = [torch.autograd.grad(g(a, chosen).square().sum(), leaves) for g in (compiled, f)]
            for x, y in zip(*results, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-4)


@recipes
@pytest.mark.parametrize("weight_only", [False, True])
def test_opcheck_of_a_frozen_weight(weight_only: bool, recipe: str) -> None:
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for rows in (1, 3):
        a, bias = torch.randn(rows, 100, requires_grad=True), torch.randn(50, requires_grad=True)
        frozen = frozen_weight(recipe, torch.randn(100, 50))
        options = {"bias": bias, "b_scale": frozen["b_scale"], "weight_only": weight_only}
        assert torch.library.opcheck(op(recipe), (a, frozen["b"]), options, test_utils=checks) == dict.fromkeys(checks, "SUCCESS")


@recipes
def test_a_frozen_weight_and_its_scale_are_neither_changed_nor_returned(recipe: str) -> None:
    frozen, bias = frozen_weight(recipe, torch.randn(100, 50)), torch.randn(50)
    for rows in (0, 1, 5):
        given = [torch.randn(rows, 100, requires_grad=True), *frozen.values(), bias]
        before, versions = [x.detach().float().clone() for x in given], [x._version for x in given]
        out = op(recipe)(given[0], bias=bias, weight_only=True, **frozen)
        out.sum().backward()
        assert [x._version for x in given] == versions
        assert all(torch.equal(x.float(), y) for x, y in zip(given, before, strict=True))
        assert out.untyped_storage()._cdata not in {x.untyped_storage()._cdata for x in given}


@recipes
def test_meta_tensors_with_a_frozen_weight_give_the_shape(recipe: str) -> None:
    frozen = {name: x.to("meta") for name, x in frozen_weight(recipe, torch.randn(100, 50)).items()}
    for rows in (1, 4):
        out = op(recipe)(torch.ones(rows, 100, device="meta"), weight_only=True, **frozen)
        assert (out.device.type, out.shape, out.dtype) == ("meta", (rows, 50), torch.float32)


@recipes
def test_a_result_of_two_dimensions_is_a_tensor_of_its_own(recipe: str) -> None:
    a, b, factor = torch.randn(4, 32), torch.randn(32, 16), torch.ones((), requires_grad=True)
    with torch.no_grad():
        product = op(recipe)(a, b)
    product.mul_(factor)  # of a view made in no_grad, autograd would refuse it
    assert product.requires_grad
    assert not op(recipe)(a, b.requires_grad_()).detach_().requires_grad
