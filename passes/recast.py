"""recast: a weight quantized for dgrad stays in the backward graph, on Inductor's joint graph.

    forward: w8_t = cast(w^T), saved    backward: scaled_mm(grad8, w8_t)
    ->
    forward:                            backward: scaled_mm(grad8, cast(w^T))

The weight outlives the step in high precision whatever is saved, so a saved FP8 copy is pure cost: one byte a parameter. The
partitioner would save it because a GEMM reads it, and what a GEMM reads it never recomputes.
"""

from __future__ import annotations

from torch import Tensor, fx

from fp8fx.formats import E4M3, E5M2

__all__ = ["run"]

_FP8 = (E4M3.dtype, E5M2.dtype)


def run(graph: fx.Graph) -> None:
    """Marks the FP8 tensors that backward computes as its own, in place. An inference graph has none."""
    for node in graph.nodes:
        found = node.meta.get("val")
        if isinstance(found, Tensor) and found.dtype in _FP8 and node.meta.get("partitioner_tag") == "is_backward":
            node.meta["partitioner_tag"] = "must_be_in_backward"
