"""own_outputs: each result of a body is memory of its own, on Inductor's joint graph.

    body(w, x): y = mm(x, t(w)); return y, view(y), t(w), y     a, b, c, d = call(body, w, x)
    ->
    body(w, x): y = mm(x, t(w)); return y                       a = call(body, w, x); b = view(a); c = t(w); d = a

Inductor takes the results of a call for new memory. If two share it, or one shares it with an operand, Inductor may
write to one while the other is still read. What forward saves for backward often does.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from fp8fx.graph.operators import views_first

__all__ = ["run"]

aten = torch.ops.aten


def _is_view(node: fx.Node) -> bool:
    return node.op == "call_function" and views_first(node)


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


def _is_size(node: fx.Node) -> bool:
    """Whether a node is an input, or a number that follows from the inputs, such as a symbolic size of one."""
    if node.op == "placeholder" or isinstance(node.meta.get("val"), Tensor):
        return node.op == "placeholder"
    return isinstance(node.meta.get("val"), (int, torch.SymInt)) and all(map(_is_size, node.all_input_nodes))


def _are_seen_outside(views: list[fx.Node]) -> bool:
    """Whether these views can be made outside the body."""
    return all(_is_size(size) for view in views for size in view.all_input_nodes[1:])


class _Body:
    """A body, what it is to return, and what its present results are of that."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.inputs = gm.graph.find_nodes(op="placeholder")
        self.output = gm.graph.output_node()
        results: Any = self.output.args[0]
        self.results: list[Any] = list(results)
        self.parts = [self._part(x) if isinstance(x, fx.Node) else (x, []) for x in self.results]
        made = [root for root, _ in self.parts if isinstance(root, fx.Node) and not _is_size(root)]
        self.returned = list(dict.fromkeys(made))

    def _part(self, result: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
        """What the body is to return, and the views of it that are the result."""
        root, views = _without_views(result)
        if _are_seen_outside(views):
            return root, views
        with self.gm.graph.inserting_after(result):
            copy = self.gm.graph.call_function(aten.clone.default, (result,))
        copy.meta = dict(result.meta)
        return copy, []

    def is_settled(self) -> bool:
        """Whether no two results share memory, nor does one with an input."""
        return [x for x in self.results if isinstance(x, fx.Node)] == self.returned

    def change(self) -> None:
        """Has the body return nothing else than `returned`."""
        self.output.args = (tuple(self.returned),)
        self.gm.recompile()


def _values(nodes: list[fx.Node]) -> tuple[Any, ...]:
    return tuple(node.meta.get("val") for node in nodes)


class _Outside:
    """What nodes of a body are where it is called, in front of what reads one of its results."""

    def __init__(self, call: fx.Node, body: _Body, reader: fx.Node) -> None:
        self.call, self.body, self.reader = call, body, reader
        self.known: dict[fx.Node, Any] = dict(zip(body.inputs, call.args[2:], strict=True))

    def of(self, node: fx.Node) -> Any:
        """An operand, a result, or the same computed once more."""
        if node not in self.known:
            if node in self.body.returned:
                new = self.call.graph.call_function(operator.getitem, (self.call, self.body.returned.index(node)))
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), self.of)
                new = self.call.graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
            new.meta = {**self.reader.meta, "val": node.meta.get("val")}
            self.known[node] = new
        return self.known[node]


def _replace(reader: fx.Node, result: Any) -> None:
    """Puts a node, a number or None in the place of a node."""
    if isinstance(result, fx.Node):
        reader.replace_all_uses_with(result)
    for user in list(reader.users):
        user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), lambda node: result if node is reader else node)
    reader.graph.erase_node(reader)


def _change_call(call: fx.Node, body: _Body) -> None:
    """Has what reads a call's results read the new ones, the operands, or views of these."""
    graph = call.graph
    for reader in list(call.users):
        place = reader.args[1]
        assert reader.target is operator.getitem and isinstance(place, int), "a call's results are read one by one"
        root, views = body.parts[place]
        result: Any = root  # None, or a number
        if isinstance(root, fx.Node):
            with graph.inserting_before(reader):
                result = _Outside(call, body, reader).of(views[-1] if views else root)
        _replace(reader, result)
    call.meta["val"] = _values(body.returned)


def run(graph: fx.Graph) -> None:
    """Changes bodies and their calls, in place."""
    owner = graph.owning_module
    calls: dict[fx.GraphModule, list[fx.Node]] = {}  # a body may have two names
    for call in graph.find_nodes(op="call_function", target=torch.ops.higher_order.invoke_subgraph):
        body = call.args[0]
        assert isinstance(body, fx.Node)
        calls.setdefault(getattr(owner, str(body.target)), []).append(call)
    for module, of_body in calls.items():
        body = _Body(module)
        if body.is_settled():
            continue
        for call in of_body:
            _change_call(call, body)
        body.change()
