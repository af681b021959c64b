"""A single row times a frozen weight stays unquantized if the op is told so, whenever its being alone is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fp8fx.ops.matmul import op
from tests.support.contract import ROUNDING, dtypes, error, frozen_weight, recipes


def ways(recipe: str, a: Tensor, frozen: dict[str, Tensor], bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What a frozen weight gives with an `a` as it is, in float64, and with a quantized one."""
    scale = frozen["b_scale"].double()
    exact = a.double() @ (frozen["b"].double() * (scale.t() if scale.dim() else scale))
    return exact if bias is None else exact + bias.double(), op(recipe)(a, bias=bias, **frozen)


@recipes
@dtypes
@pytest.mark.parametrize("leading", [(1,), (1, 1), (), (1, 1, 1)], ids=str)
def test_a_single_row_stays_as_it_is(leading: tuple[int, ...], dtype: torch.dtype, recipe: str) -> None:
    a, bias, frozen = (
        torch.randn(*leading, 100).to(dtype),
        torch.randn(50).to(dtype),
        frozen_weight(recipe, torch.randn(100, 50)),
    )
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
    results = [
        torch.autograd.grad(op(recipe)(a, bias=bias, weight_only=way, **frozen), (a, bias), grad)
        for way in (True, False)
    ]
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@recipes
def test_a_row_that_is_not_finite_keeps_its_values(recipe: str) -> None:
    a, frozen = torch.ones(1, 100), frozen_weight(recipe, torch.ones(100, 50))
    a[0, 3] = math.inf
    assert torch.equal(op(recipe)(a, weight_only=True, **frozen), torch.full((1, 50), math.inf))


BACKENDS = [
    ("mixed", "aot_eager"),
    ("global", "aot_eager"),
    ("rowwise", "aot_eager"),
    pytest.param("rowwise", "inductor", marks=pytest.mark.compiles),
]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "backend"), BACKENDS)
def test_whether_a_row_is_alone_is_found_for_each_shape(backend: str, recipe: str) -> None:
    frozen = frozen_weight(recipe, torch.randn(100, 50))
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(
        lambda a: op(recipe)(a, weight_only=True, **frozen), backend=counter, fullgraph=True, dynamic=True
    )
    for m in (7, 2, 3, 1, 4, 5, 9, 1, 0):
        a = torch.randn(m, 100)
        exact, quantized = ways(recipe, a, frozen)
        torch.testing.assert_close(compiled(a), exact.float() if m == 1 else quantized, rtol=1e-5, atol=1e-4)
    assert counter.frame_count <= 3  # one row, none, and any other number


@pytest.mark.slow
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
            torch.testing.assert_close(
                compiled(a, chosen), exact.float() if rows == 1 else quantized, rtol=1e-5, atol=1e-4
            )
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_row_known_only_at_run_time_has_its_gradient(with_bias: bool) -> None:
    frozen, bias = (
        frozen_weight("mixed", torch.randn(100, 50)),
        torch.randn(50, requires_grad=True) if with_bias else None,
    )

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
