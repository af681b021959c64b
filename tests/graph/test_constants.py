"""Which nodes are constants, however the model was traced."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx, nn

from fp8fx.graph.constants import constants
from fp8fx.graph.names import name_of
from tests.support.capture import Capture
from tests.support.graphs import Model, node


def test_constants_of_a_traced_module() -> None:
    gm = fx.symbolic_trace(Model())
    assert {n.target for n in constants(gm, None)} == {"w", "inner.bias", "constant"}


def test_a_submodule_is_no_constant() -> None:
    graph = fx.Graph()
    graph.output(graph.get_attr("inner"))
    gm = fx.GraphModule(Model(), graph)
    assert constants(gm, None) == set()


def test_constants_among_the_inputs() -> None:
    gm = fx.symbolic_trace(lambda x, w, b: F.linear(x, w, b))
    x, w = torch.randn(2, 4), nn.Parameter(torch.randn(4, 4))
    assert constants(gm, None) == set()
    assert {n.name for n in constants(gm, (x, w, w.detach()))} == {"w"}
    node(gm, "b").meta["val"] = w
    assert {n.name for n in constants(gm, (x,))} == {"b"}


def test_constants_of_dynamo() -> None:
    model, closed, x = Model(), torch.randn(4, 4), torch.randn(2, 4)
    capture = Capture()
    torch.compile(lambda x: model(x) @ closed @ GLOBAL, backend=capture)(x)
    gm = capture.only.before
    placeholders = gm.graph.find_nodes(op="placeholder")
    found = constants(gm, None)
    assert [n.name for n in placeholders if n not in found] == ["l_x_"]
    assert len(found) == len(placeholders) - 1 == 7


def test_constants_of_a_compiled_module() -> None:
    capture = Capture()
    torch.compile(Model(), backend=capture)(torch.randn(2, 4))
    gm = capture.only.before
    found = {name_of(n) for n in constants(gm, None)}
    assert found == {"inner.fc.weight", "inner.fc.bias", "inner.bias", "w", "constant"}
    assert len(gm.graph.find_nodes(op="placeholder")) == 6


def test_an_argument_of_a_function_is_no_constant() -> None:
    capture = Capture()
    torch.compile(lambda x, w: x @ w, backend=capture)(torch.randn(2, 4), torch.randn(4, 4))
    assert constants(capture.only.before, None) == set()


GLOBAL = torch.randn(4, 4)
