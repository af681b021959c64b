"""wgrad_first: a linear's dgrad runs after its high-precision wgrad, on Inductor's final graph.

    y = mm(t(grad), a); x = scaled_mm(cast(grad), w8)
    ->
    y = mm(t(grad), a); x = control_deps([y], scaled_mm, cast(grad), w8)

where `a` is recomputed for that wgrad alone. Were dgrad free to run first, Inductor would fuse the recomputation of `a` with the
backward of what computed `a`, which reads the same tensors and waits for dgrad: `a`, its gradient and the gradients of its inputs
would all be in memory at once. This way `a` is gone before its gradient is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from fp8fx.recipes.formats import E5M2
from fp8fx.torch_internals import SCALED_MM, OrderedSet, preserve_node_ordering

__all__ = ["run"]

aten, prims = torch.ops.aten, torch.ops.prims


_VIEWS = (aten.permute.default, aten.t.default, aten.view.default, aten.reshape.default, aten.clone.default)


def _behind(node: Any) -> Any:
    """What a node is a view or copy of."""
    while isinstance(node, fx.Node) and node.target in _VIEWS:
        node = node.args[0]
    return node


def _gradient(dgrad: fx.Node) -> Any:
    """What the E5M2 operand of `dgrad` was cast from: cast(mul(float(grad), 1 / scale)), where a float32 gradient needs no float."""
    node = _behind(dgrad.args[0])
    if node.meta["val"].dtype != E5M2.dtype:
        return None
    for target in (prims.convert_element_type.default, aten.mul.Tensor):
        if getattr(node, "target", None) is not target:
            return None
        node = _behind(node.args[0])
    return _behind(node.args[0]) if getattr(node, "target", None) is prims.convert_element_type.default else node


def _follows(node: fx.Node, dgrad: fx.Node, order: Mapping[fx.Node, int]) -> bool:
    """Whether `node` is computed from `dgrad`, as where a model multiplies gradients itself."""
    pending, seen = [node], {node}
    while pending:
        node = pending.pop()
        if node is dgrad:
            return True
        new = [source for source in node.all_input_nodes if source not in seen and order[source] >= order[dgrad]]
        seen.update(new)
        pending += new
    return False


def _pairs(graph: fx.Graph) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Each dgrad with the wgrad of the same gradient, where `a` is computed in this graph and for that wgrad alone."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    wgrads: dict[Any, list[tuple[fx.Node, Any]]] = {}  # by either operand, with the other
    for mm in graph.find_nodes(op="call_function", target=aten.mm.default):
        left, right = map(_behind, mm.args)
        wgrads.setdefault(left, []).append((mm, right))
        wgrads.setdefault(right, []).append((mm, left))
    for dgrad in graph.find_nodes(op="call_function", target=SCALED_MM):
        for mm, a in wgrads.get(_gradient(dgrad), ()):
            if a.op != "placeholder" and len(wgrads[a]) == 1 and not _follows(mm, dgrad, order):
                yield dgrad, mm


def run(graph: fx.Graph) -> None:
    """Inserts the dependencies, in place."""
    preserve_node_ordering(graph, {dgrad: OrderedSet([wgrad]) for dgrad, wgrad in _pairs(graph)})
