"""share: two equal quantizations -> one, on Inductor's inference graph.

    q1 = quantize(x); q2 = quantize(x)  ->  q1 = q2 = quantize(x)

AOTAutograd's partitioner runs this very elimination on training graphs and none on inference graphs, where q, k and v would
each quantize the same input. It is a pass of the compiler's own graph, after the ops have decomposed, not of PIPELINE.
"""

from __future__ import annotations

from torch import fx

from fp8fx.torch_internals import fx_graph_cse

__all__ = ["run"]


def run(graph: fx.Graph) -> None:
    """Eliminates common subexpressions of an inference graph, in place in its owning module."""
    is_training = any("tangents" in node.name for node in graph.find_nodes(op="placeholder"))
    if not is_training and graph.owning_module is not None:
        graph.owning_module.graph = fx_graph_cse(graph)
