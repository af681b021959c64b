"""own_outputs: each result of a body is memory of its own, on Inductor's joint graph.

    body(w, x): y = mm(x, t(w)); return y, view(y), t(w), y     a, b, c, d = call(body, w, x)
    ->
    body(w, x): y = mm(x, t(w)); return y                       a = call(body, w, x); b = view(a); c = t(w); d = a

Inductor takes the results of a call for new memory. Where they share it with each other or with an operand, as what
backward saves does, it would write to one of them while another is still read.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fp8fx.graph.operators import views_first

__all__ = ["run"]


def _is_view(node: fx.Node) -> bool:
    """Whether a node is a view of its first argument and reads nothing else."""
    return node.op == "call_function" and views_first(node) and node.all_input_nodes == [node.args[0]]


def _without_views(node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """What makes the memory of a node's value, and the views from there to the node, in their order."""
    views: list[fx.Node] = []
    while _is_view(node):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if node.target is operator.getitem and not _is_view(source):
            break  # one of several results, which are apart
        views.insert(0, node)
        node = source
    return node, views


class _Body:
    """A body, what it is to return, and what its present results are of that."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.inputs = gm.graph.find_nodes(op="placeholder")
        self.output = gm.graph.output_node()
        results: Any = self.output.args[0]
        self.results: list[Any] = list(results)
        self.parts = [_without_views(x) if isinstance(x, fx.Node) else (x, []) for x in self.results]
        made = [root for root, _ in self.parts if isinstance(root, fx.Node) and root not in self.inputs]
        self.returned = list(dict.fromkeys(made))

    def is_settled(self) -> bool:
        """Whether the results are apart already."""
        return [x for x in self.results if isinstance(x, fx.Node)] == self.returned

    def change(self) -> None:
        """Returns nothing but what is apart."""
        self.output.args = (tuple(self.returned),)
        self.gm.recompile()


def _values(nodes: list[fx.Node]) -> tuple[Any, ...]:
    return tuple(node.meta.get("val") for node in nodes)


def _change_call(call: fx.Node, body: _Body) -> None:
    """Has what reads a call's results read the new ones, the operands, or views of these."""
    graph = call.graph
    operands = call.args[2:]
    for reader in list(call.users):
        place = reader.args[1]
        assert reader.target is operator.getitem and isinstance(place, int), "a call's results are read one by one"
        root, views = body.parts[place]
        with graph.inserting_before(reader):
            if not isinstance(root, fx.Node):
                continue  # None, or a number
            if root in body.inputs:
                result: Any = operands[body.inputs.index(root)]
            else:
                result = graph.call_function(operator.getitem, (call, body.returned.index(root)))
                result.meta = {**reader.meta, "val": root.meta.get("val")}
            for view in views:
                result = graph.call_function(view.target, (result, *view.args[1:]), view.kwargs)  # type: ignore[arg-type]
                result.meta = {**reader.meta, "val": view.meta.get("val")}
        reader.replace_all_uses_with(result)
        graph.erase_node(reader)
    call.meta["val"] = _values(body.returned)


def run(graph: fx.Graph) -> None:
    """Changes bodies and their calls, in place."""
    owner = graph.owning_module
    calls: dict[str, list[fx.Node]] = {}
    for call in graph.find_nodes(op="call_function", target=torch.ops.higher_order.invoke_subgraph):
        body = call.args[0]
        assert isinstance(body, fx.Node)
        calls.setdefault(str(body.target), []).append(call)
    for name, of_body in calls.items():
        body = _Body(getattr(owner, name))
        if body.is_settled():
            continue
        for call in of_body:
            _change_call(call, body)
        body.change()
