"""own_outputs: what a body gives of its inputs' memory, or of another result's, is read outside it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fp8fx.passes.inductor import own_outputs
from tests.support.capture import ops

aten = torch.ops.aten
INVOKE = torch.ops.higher_order.invoke_subgraph

Results = tuple[Tensor | None, ...]


def new(x: Tensor, w: Tensor) -> Results:
    return x.mm(w), x.sin()


def twice(x: Tensor, w: Tensor) -> Results:
    y = x.mm(w)
    return y, x.sin(), y


def inputs(x: Tensor, w: Tensor) -> Results:
    return w, x.mm(w), x


def views(x: Tensor, w: Tensor) -> Results:
    y = x.mm(w)
    return y.view(2, -1), None, w.t(), y, y.t()[1:]


def views_alone(x: Tensor, w: Tensor) -> Results:
    y = x.mm(w)
    return y.t(), y.view(-1)


def parts(x: Tensor, w: Tensor) -> Results:
    largest, places = aten.max.dim(x.mm(w), 0)
    return largest, places, *x.mm(w).split(2, 1)


BODIES = [new, twice, inputs, views, views_alone, parts]


def calling(body: Callable[..., Results]) -> tuple[fx.GraphModule, tuple[Tensor, Tensor]]:
    """A graph that calls a body for each of two inputs, and gives a function of each result."""
    given = torch.randn(4, 4), torch.randn(4, 4)
    x, w = given
    inner = make_fx(body)(x, w)
    results: Any = inner.graph.output_node().args[0]
    graph = fx.Graph()
    nodes = [graph.placeholder(name) for name in ("x", "w")]
    for node, value in zip(nodes, given, strict=True):
        node.meta["val"] = value
    attribute = graph.get_attr("body")
    outputs = []
    for operands in (nodes, nodes[::-1]):
        call = graph.call_function(INVOKE, (attribute, "body", *operands))
        for place, result in enumerate(results):
            read = graph.call_function(operator.getitem, (call, place))
            outputs.append(read if result is None else graph.call_function(aten.neg.default, (read,)))
    graph.output(tuple(outputs))
    return fx.GraphModule({"body": inner}, graph), given


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_results_are_the_same_and_of_memory_of_their_own(body: Callable[..., Results]) -> None:
    gm, given = calling(body)
    before = gm(*given)
    own_outputs.run(gm.graph)
    gm.graph.lint()
    gm.recompile()
    for value, reference in zip(gm(*given), before, strict=True):
        assert value is reference is None or torch.equal(value, reference)
    results = [x for x in gm.body(*given) if x is not None]
    memory = {x.untyped_storage().data_ptr() for x in (*results, *given)}
    assert len(memory) == len(results) + len(given)


@pytest.mark.parametrize("size_is_known_outside", [True, False], ids=["input", "own"])
def test_views_of_symbolic_sizes(size_is_known_outside: bool) -> None:
    """The size is an input of the body, or it is computed of a result."""
    inner = fx.Graph()
    size, x, w = (inner.placeholder(name) for name in ("size", "x", "w"))
    y = inner.call_function(aten.mm.default, (x, w))
    rows = size if size_is_known_outside else inner.call_function(aten.sym_size.int, (y, 0))
    of_result, of_input = (inner.call_function(aten.view.default, (node, [rows, 2, -1])) for node in (y, x))
    inner.output((of_result, y, of_input))
    given = 4, torch.randn(4, 4), torch.randn(4, 4)
    for node, value in zip((size, x, w, y, rows), (*given, given[1], 4), strict=True):
        node.meta["val"] = value
    outer = fx.Graph()
    operands = [outer.placeholder(name) for name in ("size", "x", "w")]
    call = outer.call_function(INVOKE, (outer.get_attr("body"), "body", *operands))
    outer.output(tuple(outer.call_function(operator.getitem, (call, place)) for place in range(3)))
    gm = fx.GraphModule({"body": fx.GraphModule({}, inner)}, outer)
    before = gm(*given)
    own_outputs.run(gm.graph)
    gm.graph.lint()
    gm.recompile()
    assert all(map(torch.equal, gm(*given), before))
    results = [*gm.body(*given), *given[1:]]
    assert len({x.untyped_storage().data_ptr() for x in results}) == len(results)


def test_a_body_whose_results_are_apart_is_left_alone() -> None:
    gm, _ = calling(new)
    before = str(gm.graph), str(gm.body.graph)
    own_outputs.run(gm.graph)
    assert (str(gm.graph), str(gm.body.graph)) == before


def test_only_what_makes_memory_is_returned() -> None:
    gm, _ = calling(views)
    own_outputs.run(gm.graph)
    (result,) = gm.body.graph.output_node().args[0]
    assert result.target is aten.mm.default
    assert ops(gm.graph)[aten.t.default] == 2 * 2
