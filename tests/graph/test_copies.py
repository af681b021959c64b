"""Copies of graphs have graphs of their own, and hold what the originals hold."""

from __future__ import annotations

import torch
from torch import fx, nn

from fp8fx.graph.copies import copy, take_over
from tests.support.graphs import Model, node


def test_copy_has_a_graph_of_its_own() -> None:
    gm = fx.symbolic_trace(Model())
    new = copy(gm)
    assert new.code == gm.code
    assert str(new.graph) == str(gm.graph)
    assert [n.name for n in new.graph.nodes] == [n.name for n in gm.graph.nodes]
    assert not set(new.graph.nodes) & set(gm.graph.nodes)
    new.graph.erase_node(new.graph.call_function(torch.ones, (2,)))
    node(new, "add").replace_all_uses_with(node(new, "matmul"))
    new.recompile()
    assert new.code != gm.code
    assert type(new).__name__ == type(gm).__name__ == "Model"
    x = torch.randn(2, 4)
    assert torch.equal(copy(gm)(x), gm(x))


def test_copy_keeps_every_meta() -> None:
    gm = fx.symbolic_trace(Model())
    for i, n in enumerate(gm.graph.nodes):
        n.meta["mine"] = i  # the output's too
    gm.meta["mine"] = 7
    new = copy(gm)
    assert [n.meta for n in new.graph.nodes] == [n.meta for n in gm.graph.nodes]
    assert new.meta == gm.meta
    new.graph.find_nodes(op="placeholder")[0].meta["mine"] = "changed"
    new.meta["mine"] = "changed"
    assert (gm.graph.find_nodes(op="placeholder")[0].meta["mine"], gm.meta["mine"]) == (0, 7)


def test_copy_of_an_empty_graph() -> None:
    graph = fx.Graph()
    gm = fx.GraphModule(nn.Module(), graph)  # no output at all
    assert len(copy(gm).graph.nodes) == 0


def test_copy_holds_what_the_original_holds() -> None:
    gm = torch.export.export(Model(), (torch.randn(2, 4),)).module()
    gm.inner.train(False)
    new = copy(gm)
    assert list(new.state_dict()) == list(gm.state_dict()) == ["w", "inner.fc.weight", "inner.fc.bias"]
    assert [name for name, _ in new.named_buffers()] == [name for name, _ in gm.named_buffers()] == ["inner.bias"]
    assert all(a is b for a, b in zip(new.parameters(), gm.parameters(), strict=True))
    assert new.constant is gm.constant
    assert (new.training, new.inner.training) == (gm.training, False)
    new.inner.extra = nn.Linear(1, 1)  # the containers are its own
    assert not hasattr(gm.inner, "extra")


def test_take_over_of_shared_containers() -> None:
    root, shared = nn.Module(), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    root.a, root.b, root.unused = shared, shared, nn.Linear(4, 4)
    graph = fx.Graph()
    graph.output(graph.call_module("a.0", (graph.call_module("b.1", (graph.placeholder("x"),)),)))
    gm = fx.GraphModule(root, graph)
    assert "a.1.weight" not in gm.state_dict()  # which is what it is for
    take_over(gm, root)
    assert list(gm.state_dict()) == list(root.state_dict())
    assert gm.get_submodule("a.0") is gm.get_submodule("b.0") is shared[0]
    assert gm.unused is root.unused
