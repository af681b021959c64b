"""invert_once: the reciprocal of a tensor's scale is computed once, on Inductor's final graph.

    r = float(reciprocal(double(scale))); q = cast(mul(x, r))
    ->
    r = as_strided(float(reciprocal(double(scale))), [], []); q = cast(mul(x, r))

Inductor inlines r into each cast, where every thread would do the division again, in float64. What as_strided reads has to
lie in memory, so r is computed where the scale is.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

__all__ = ["run"]

aten, prims = torch.ops.aten, torch.ops.prims


def _is_inverse(node: fx.Node) -> bool:
    found = node.meta.get("val")
    return (
        node.target is prims.convert_element_type.default
        and isinstance(found, Tensor)
        and found.dim() == 0
        and getattr(node.args[0], "target", None) is aten.reciprocal.default
    )


def run(graph: fx.Graph) -> None:
    """Inserts the stores, in place."""
    for node in graph.find_nodes(op="call_function", target=prims.convert_element_type.default):
        if not _is_inverse(node):
            continue
        with graph.inserting_after(node):
            stored = graph.call_function(aten.as_strided.default, (node, [], []))
        stored.meta = dict(node.meta)
        node.replace_all_uses_with(stored, delete_user_cb=lambda user, stored=stored: user is not stored)
