"""whole_cat: rows that are concatenated and then quantized are one row to Inductor, on its final graph.

    cat([a, b], -1)    ->    where(index < a's features, pad(a, right), pad(b, left))    on CUDA

A quantization reads a row for its amax and again for the cast. Inductor reads the parts of a `cat` at indices that it
does not see through: it takes the row for a column, splits it, and makes two kernels where one could keep the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fp8fx.graph.values import fake
from fp8fx.recipes.pattern import readers

__all__ = ["run"]

aten, prims = torch.ops.aten, torch.ops.prims


def _finds_amax_of_rows(node: fx.Node) -> bool:
    """Whether it is the abs of values whose largest of each row is read."""
    if node.target is not aten.abs.default:
        return False
    return any(user.target is aten.amax.default and user.args[1:2] == ([-1],) for user in readers(node))


def _is_part(x: Tensor | None, whole: Tensor) -> bool:
    """Whether it is of the whole's dtype and dimensions, and how many features it has is a number."""
    if x is None or x.dtype != whole.dtype or x.dim() != whole.dim():
        return False
    features = x.shape[-1]
    return isinstance(features, int) and features > 0


def _parts(cat: fx.Node) -> Sequence[fx.Node]:
    """What is concatenated along its last dimension, to be quantized; empty if it is anything else."""
    value = fake(cat)
    parts: Any = cat.args[0]
    dim = cat.args[1] if len(cat.args) > 1 else 0
    if value is None or value.device.type != "cuda" or dim not in (-1, value.dim() - 1):
        return ()
    if not all(_is_part(fake(part), value) for part in parts):
        return ()
    is_quantized = any(map(_finds_amax_of_rows, readers(cat)))
    return tuple(parts) if is_quantized else ()


def _call(like: fx.Node, value: Any, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    node = like.graph.call_function(target, args, kwargs)
    node.meta = {**like.meta, "val": value}
    return node


def _select(cat: fx.Node, parts: Sequence[fx.Node]) -> fx.Node:
    """The row made of its parts, each of them as long as the row and zero where another stands."""
    whole = cat.meta["val"]
    features = whole.shape[-1]
    index = whole.new_empty(features, dtype=torch.int64)
    options = {"start": 0, "step": 1, "dtype": torch.int64, "device": whole.device, "requires_grad": False}
    indices = _call(cat, index, prims.iota.default, features, **options)
    start, row = 0, None
    for part in parts:
        size = part.meta["val"].shape[-1]
        padded = _call(cat, whole, aten.constant_pad_nd.default, part, [start, features - start - size])
        if row is None:
            row = padded
        else:
            before = _call(cat, index.bool(), aten.lt.Scalar, indices, start)
            row = _call(cat, whole, aten.where.self, before, row, padded)
        start += size
    assert row is not None
    return row


def run(graph: fx.Graph) -> None:
    """Replaces the concatenations, in place."""
    for cat in graph.find_nodes(op="call_function", target=aten.cat.default):
        parts = _parts(cat)
        if len(parts) > 1:
            with graph.inserting_before(cat):
                row = _select(cat, parts)
            cat.replace_all_uses_with(row)
            graph.erase_node(cat)
