"""sigmoid_of_gelu: GELU's tanh becomes a sigmoid, which differs by a rounding; no other tanh does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

import fp8fx
from fp8fx.passes.inductor import sigmoid_of_gelu
from tests.support.capture import ops

aten = torch.ops.aten
Function = Callable[[Tensor], Tensor]

DECOMPOSITIONS = torch._decomp.get_decompositions([aten.gelu, aten.gelu_backward])


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def by_hand(x: Tensor) -> Tensor:
    """As transformers' `gelu_new` is written."""
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * torch.pow(x, 3.0))))


def backward(x: Tensor) -> Tensor:
    out: Tensor = aten.gelu_backward(torch.ones_like(x), x, approximate="tanh")
    return out


def plain(x: Tensor) -> Tensor:
    return x.tanh()


def plus_two(x: Tensor) -> Tensor:
    return x.tanh() + 2


def half_as_much(x: Tensor) -> Tensor:
    return torch.add(x.tanh(), 1, alpha=0.5)


def plus_a_tensor(x: Tensor) -> Tensor:
    return x.tanh() + torch.ones_like(x)


def read_itself_too(x: Tensor) -> Tensor:
    """A sigmoid has few digits of the tanh of a small number."""
    y = x.tanh()
    return (y + 1) * y.reciprocal()


def traced(function: Function, x: Tensor) -> fx.GraphModule:
    gm: fx.GraphModule = make_fx(function, decomposition_table=DECOMPOSITIONS)(x)
    return gm


def rewritten(function: Function, x: Tensor) -> fx.GraphModule:
    gm = traced(function, x)
    sigmoid_of_gelu.run(gm.graph)
    gm.graph.lint()
    gm.recompile()
    return gm


def values() -> Tensor:
    return torch.cat([torch.linspace(-12, 12, 4001), torch.randn(1000) * 1e-3, torch.tensor([0.0, -0.0, 60.0, -60.0])])


@pytest.mark.parametrize("function", [gelu, by_hand])
def test_the_difference_is_a_rounding_of_float32(function: Function) -> None:
    x = values()
    gm = rewritten(function, x)
    assert aten.tanh.default not in ops(gm.graph)
    assert aten.sigmoid.default in ops(gm.graph)
    exact = function(x.double())
    before = (function(x).double() - exact).abs()
    after = (gm(x).double() - exact).abs()
    assert after.mean() <= 1.5 * before.mean()
    assert after.max() <= 1.5 * before.max()


@pytest.mark.parametrize("function", [gelu, by_hand])
def test_what_is_not_finite_stays_so(function: Function) -> None:
    x = torch.tensor([torch.inf, torch.nan, 3e38])
    expected = function(x)
    assert torch.equal(rewritten(function, x)(x).isnan(), expected.isnan())
    assert torch.equal(rewritten(function, x)(x).isinf(), expected.isinf())


@pytest.mark.parametrize("function", [plain, plus_two, half_as_much, plus_a_tensor, read_itself_too, backward])
def test_another_tanh_is_left_alone(function: Function) -> None:
    x = values()
    assert ops(rewritten(function, x).graph) == ops(traced(function, x).graph)


def test_a_tanh_of_another_dtype_is_left_alone() -> None:
    x = values().double()
    assert aten.tanh.default in ops(rewritten(by_hand, x).graph)


@pytest.mark.compiles
def test_a_compiled_mlp_has_no_tanh() -> None:
    mlp = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(approximate="tanh"), torch.nn.Linear(128, 64))
    x = torch.randn(32, 64)
    compiled = torch.compile(mlp, backend="fp8", options={"profit": "always"})
    with torch.no_grad():
        y, codes = run_and_get_code(compiled, x)
        converted = fp8fx.convert(mlp, (x,))(x)
    assert "tanh" not in "".join(codes)
    assert float((y - converted).norm() / converted.norm()) < 0.02
