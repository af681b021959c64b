"""invert_once: the reciprocal of a tensor's scale is computed once, on Inductor's final graph.

    r = float(reciprocal(double(scale))); q = cast(mul(x, r))
    ->
    r = as_strided(float(reciprocal(double(scale))), [], []); q = cast(mul(x, r))

Inductor inlines r into each cast, where every thread would do the division again, in float64. What as_strided reads has to
lie in memory, so r is computed where the scale is. The cast of a weight, which only moves bytes, hides the division.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["run"]

aten, prims = torch.ops.aten, torch.ops.prims


_CHAIN = (
    prims.convert_element_type.default,
    aten.permute.default,
    aten.t.default,
    aten.view.default,
    aten.reshape.default,
)


def _is_inverse(node: fx.Node) -> bool:
    found = node.meta.get("val")
    return (
        isinstance(found, Tensor)
        and found.dim() == 0
        and getattr(node.args[0], "target", None) is aten.reciprocal.default
    )


def _is_stored(node: Any) -> bool:
    """Whether a cast's source, mul(float(x), r), lies in memory: such a cast waits for it, and has time for a division."""
    source = node.args[0] if node.target is aten.mul.Tensor else node
    while isinstance(source, fx.Node) and source.target in _CHAIN:
        source = source.args[0]
    return isinstance(source, fx.Node) and source.op == "placeholder"


def run(graph: fx.Graph) -> None:
    """Inserts the stores, in place."""
    for node in graph.find_nodes(op="call_function", target=prims.convert_element_type.default):
        if not _is_inverse(node) or all(map(_is_stored, node.users)):
            continue
        with graph.inserting_after(node):
            stored = graph.call_function(aten.as_strided.default, (node, [], []))
        stored.meta = dict(node.meta)
        node.replace_all_uses_with(stored, delete_user_cb=lambda user, stored=stored: user is not stored)
