"""A linear as make_fx and torch.export's decompositions leave it: a 2-D matmul between views becomes the op between the
same views."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from fp8fx.convert import convert
from tests.support.capture import assert_same_graph
from tests.support.forms import K, N, aten, example, fp8, graph_of


@dataclass(frozen=True)
class Traced:
    """What one tracer makes of a linear.

    Attributes:
        trace: the tracer.
        turn: how it transposes a weight.
        names: what it calls the input and the weights.
    """

    trace: Callable[[Callable[..., Any], Tensor, tuple[Tensor, ...]], fx.GraphModule]
    turn: Callable[[Tensor], Tensor]
    names: tuple[str, ...]


class Parameters(nn.Module):
    """A function of an input and some parameters, as a module."""

    def __init__(self, function: Callable[..., Any], tensors: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.function = function
        self.tensors = nn.ParameterList(tensors)

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *self.tensors)


def decomposed(function: Callable[..., Any], x: Tensor, tensors: tuple[Tensor, ...]) -> fx.GraphModule:
    exported = torch.export.export(Parameters(function, tensors), (x,)).run_decompositions()
    return exported.module(check_guards=False)  # type: ignore[return-value]


TRACED = {
    "make_fx": Traced(
        lambda function, x, tensors: make_fx(Parameters(function, tensors))(x),
        aten.t.default,
        ("arg0_1", "_param_constant0", "_param_constant1"),
    ),
    "decomposed": Traced(
        decomposed,
        lambda w: aten.permute.default(w, [1, 0]),
        ("x", "tensors.0", "tensors.1"),
    ),
}

# The form; what is expected, given how to flatten x, transpose w, and unflatten y; the shapes of its weights.
ATEN: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "linear": (F.linear, lambda a, mm, x, w, b: a.view(mm(a.flat(x), a.turn(w), bias=b)), ((N, K), (N,))),
    "linear without bias": (F.linear, lambda a, mm, x, w: (lambda r: a.view(mm(a.flat(x), r)))(a.turn(w)), ((N, K),)),
    "x @ w.t()": (
        lambda x, w: x @ w.t(),
        lambda a, mm, x, w: (lambda r: a.view(mm(a.flat(x), r)))(a.turn(w)),
        ((N, K),),
    ),
    "x @ w": (torch.matmul, lambda a, mm, x, w: a.view(mm(a.flat(x), w)), ((K, N),)),
}


@dataclass(frozen=True)
class Views:
    """The views around a 2-D matmul; none for an input that is 2-D already."""

    traced: Traced
    shape: tuple[int, ...]

    def flat(self, x: Tensor) -> Tensor:
        return x if len(self.shape) == 2 else aten.view.default(x, [torch.Size(self.shape[:-1]).numel(), K])

    def turn(self, w: Tensor) -> Tensor:
        return self.traced.turn(w)

    def view(self, y: Tensor) -> Tensor:
        return y if len(self.shape) == 2 else aten.view.default(y, [*self.shape[:-1], N])


@pytest.mark.parametrize("tracer", TRACED)
@pytest.mark.parametrize("form", ATEN)
@pytest.mark.parametrize("dims", [2, 3, 4])
def test_aten(tracer: str, form: str, dims: int) -> None:
    function, expected, shapes = ATEN[form]
    tensors = tuple(torch.randn(shape) for shape in shapes)
    x, how = example(dims), TRACED[tracer]
    gm = how.trace(function, x, tensors)
    new = convert(gm)
    views = Views(how, tuple(x.shape))

    def hand(*operands: Tensor) -> Tensor:
        return expected(views, fp8("mixed"), *operands)

    graph = graph_of(hand, how.names[: len(tensors) + 1])
    if tracer == "decomposed":  # returns a tuple
        (output,) = graph.find_nodes(op="output")
        output.args = (output.args,)
    for node in new.graph.find_nodes(op="call_function", target=aten._unsafe_view.default):
        node.target = aten.view.default  # which of the two a tracer writes around a matmul is torch's
    assert_same_graph(new.graph, graph)
    assert torch.equal(new(x), hand(x, *tensors))


def test_operators_called_without_their_overload() -> None:
    class Packets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 16).requires_grad_(False)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            w = self.fc.weight
            return aten.linear(x, w, self.fc.bias), aten.mm(x, w.t()), aten.mm.out(x, w.t(), out=x.new_empty(4, 16))

    rows = convert(Packets(), (torch.randn(4, 32),)).meta["fp8fx_report"].rows
    assert [(row.form, row.reason) for row in rows] == [
        ("aten.linear", None),
        ("aten.mm", None),
        ("aten.mm", "called with other arguments than input, mat2"),
    ]
