"""wgrad_first: a linear's dgrad runs after its high-precision wgrad, on Inductor's final graph.

    y = mm(t(grad), a); x = scaled_mm(cast(grad), w8)
    ->
    y = mm(t(grad), a); x = control_deps([y], scaled_mm, cast(grad), w8)

if `a` is recomputed for that wgrad alone. Were dgrad free to run first, Inductor would fuse the recomputation of `a`
with the backward of what computed `a`: both read the same tensors, and the latter waits for dgrad. Then `a`, its
gradient and the gradients of its inputs would all be in memory at once. This way `a` is gone before its gradient is
there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from fp8fx.recipes.formats import E5M2
from fp8fx.recipes.pattern import behind_views_and_copies, cast_from
from fp8fx.torch_internals import SCALED_MM, OrderedSet, preserve_node_ordering

__all__ = ["run"]

aten = torch.ops.aten


def _gradient(dgrad: fx.Node) -> Any:
    """What the E5M2 operand of `dgrad` was cast from."""
    operand = behind_views_and_copies(dgrad.args[0])
    return cast_from(operand) if operand.meta["val"].dtype == E5M2.dtype else None


def _follows(node: fx.Node, dgrad: fx.Node, order: Mapping[fx.Node, int]) -> bool:
    """Whether `node` is computed from `dgrad`, as in a model that multiplies gradients itself."""
    pending = [node]
    seen = {node}
    while pending:
        node = pending.pop()
        if node is dgrad:
            return True
        new = [source for source in node.all_input_nodes if source not in seen and order[source] >= order[dgrad]]
        seen.update(new)
        pending += new
    return False


def _pairs(graph: fx.Graph) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Each dgrad with the wgrad of the same gradient, if `a` is computed in this graph and for that wgrad alone."""
    order = {node: position for position, node in enumerate(graph.nodes)}
    wgrads: dict[Any, list[tuple[fx.Node, Any]]] = {}  # by either operand, with the other
    for mm in graph.find_nodes(op="call_function", target=aten.mm.default):
        left, right = map(behind_views_and_copies, mm.args)
        wgrads.setdefault(left, []).append((mm, right))
        wgrads.setdefault(right, []).append((mm, left))
    for dgrad in graph.find_nodes(op="call_function", target=SCALED_MM):
        for mm, a in wgrads.get(_gradient(dgrad), ()):
            if a.op != "placeholder" and len(wgrads[a]) == 1 and not _follows(mm, dgrad, order):
                yield dgrad, mm


def run(graph: fx.Graph) -> None:
    """Inserts the dependencies, in place."""
    preserve_node_ordering(graph, {dgrad: OrderedSet([wgrad]) for dgrad, wgrad in _pairs(graph)})
