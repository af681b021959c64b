"""save_norms: a normalized activation that wgrad reads is saved in FP8, on Inductor's joint graph.

    forward: a8 = cast(norm(x)); scaled_mm(a8, w8)    backward: scaled_mm(t(cast(norm(x))), grad8)
    ->
    forward: a8 = cast(norm(x)), saved                backward: scaled_mm(t(a8), grad8)

The partitioner would recompute a8 from x, which norm's backward needs anyway. That saves a byte a value, but reads x and normalizes it
once more. An activation that is plain pointwise work is left to it: that activation's own backward reads the same tensors, Inductor fuses
the two, and to recompute is free.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import CheckpointPolicy

from fp8fx.formats import E4M3

__all__ = ["run"]

aten, prims = torch.ops.aten, torch.ops.prims
_VIEWS = (aten.permute.default, aten.t.default, aten.view.default, aten.reshape.default, aten.clone.default)
_CHAIN = 64  # nodes to look back over; a norm has about ten


def _is_pointwise(node: fx.Node) -> bool:
    return node.target is prims.convert_element_type.default or torch.Tag.pointwise in getattr(node.target, "tags", ())


def _is_normalized(cast: fx.Node) -> bool:
    """Whether the values of `cast` were scaled by a statistic of a row: one computed and smaller, but not a single number."""
    pending, seen = [cast], {cast}
    while pending and len(seen) < _CHAIN:
        node = pending.pop()
        for source in node.all_input_nodes if node.target in _VIEWS or _is_pointwise(node) else ():
            value = source.meta.get("val")
            if source in seen or source.op != "call_function" or not isinstance(value, Tensor) or value.dim() == 0:
                continue
            if value.dim() > 1 and value.shape[-1] == 1 != cast.meta["val"].shape[-1]:
                return True
            seen.add(source)
            pending.append(source)
    return False


def run(graph: fx.Graph) -> None:
    """Marks what the forward graph is to save, in place. An inference graph has none."""
    for node in graph.find_nodes(op="call_function", target=prims.convert_element_type.default):
        value = node.meta.get("val")
        in_forward = node.meta.get("partitioner_tag", "is_forward") == "is_forward"
        if not in_forward or not isinstance(value, Tensor) or value.dtype != E4M3.dtype:
            continue
        transposed = any(user.target is aten.clone.default for view in node.users for user in view.users)
        if transposed and _is_normalized(node):
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
