"""keep_unbacked: what has a size that depends on data is saved for backward, on Inductor's joint graph.

    y = x[mask]; mm(y, w); ...; mm(t(grad), y)  ->  y is marked: backward gets it saved, and does not compute it again

Computed again, it would define its size a second time, while the gradients have the size that was saved. Inductor
orders kernels by which defines a size and which uses it, and gets the order wrong then: a gradient was read before it
was written.
"""

from __future__ import annotations

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

__all__ = ["run"]


def run(graph: fx.Graph) -> None:
    """Marks the nodes that define such a size; one that a user's activation checkpoint marked keeps its mark."""
    for node in graph.nodes:
        if node.meta.get("unbacked_bindings"):
            node.meta.setdefault("recompute", CheckpointPolicy.MUST_SAVE)
