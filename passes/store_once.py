"""store_once: an FP8 operand that several GEMMs read is written to memory once, on Inductor's final graph.

    x8 = cast(x); scaled_mm(x8, v); scaled_mm(x8, w)
    ->
    x8 = force_stride_order(cast(x), strides); scaled_mm(x8, v); scaled_mm(x8, w)

Inductor inlines a pointwise operand into each `_scaled_mm` and writes it once for each; it does not for `mm`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from fp8fx.formats import E4M3, E5M2

__all__ = ["run"]

_FP8 = (E4M3.dtype, E5M2.dtype)
_VIEWS = (torch.ops.aten.permute.default, torch.ops.aten.t.default)


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """The GEMMs that read `node`, as it is or transposed."""
    for user in node.users:
        if user.target is torch.ops.aten._scaled_mm.default:
            yield user
        elif user.target in _VIEWS:
            yield from _readers(user)


def run(graph: fx.Graph) -> None:
    """Inserts the stores, in place."""
    for node in list(graph.nodes):
        found = node.meta.get("val")
        if node.op != "call_function" or node.target in _VIEWS or not isinstance(found, Tensor) or found.dtype not in _FP8:
            continue
        if len(set(_readers(node))) < 2:
            continue
        order = (2, 1) if found.stride(0) != 1 else (1, 2)  # only the order of the strides counts, and M may be symbolic
        with graph.inserting_after(node):
            stored = graph.call_function(torch.ops.prims.inductor_force_stride_order.default, (node, order))
        stored.meta = dict(node.meta)
        node.replace_all_uses_with(stored, delete_user_cb=lambda user, stored=stored: user is not stored)
