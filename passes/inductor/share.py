"""share: two equal quantizations -> one, on Inductor's graph, before forward and backward part.

    q1 = quantize(x); q2 = quantize(x)  ->  q1 = q2 = quantize(x)

AOTAutograd runs no such elimination on inference graphs: q, k and v would each quantize the same input. On training
graphs, from torch 2.15 on, it leaves apart what backward reads and what it does not: LoRA's frozen linear and its first
factor would each quantize their input. There this pass touches quantizations alone; what a model computes twice stays
torch's to decide.
"""

from __future__ import annotations

from torch import fx

from fp8fx.recipes.pattern import is_view, quantizations
from fp8fx.torch_internals import fx_graph_cse

__all__ = ["run"]

_APART = ("partitioner_tag", "recompute", "ac_graph_id", "custom")
"""In a node's meta: what backward and checkpointing compute anew, to save memory, and on which stream a node runs."""


def _behind_outputs(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose memory an output has. The caller may write to it, so that no two of these are one."""
    pending = list(graph.output_node().all_input_nodes)
    behind = set[fx.Node]()
    while pending:
        node = pending.pop()
        if node not in behind:
            behind.add(node)
            pending += node.all_input_nodes if is_view(node) else []
    return behind


def _share_quantizations(graph: fx.Graph) -> None:
    steps = quantizations(graph) - _behind_outputs(graph)
    first = dict[object, fx.Node]()
    for node in list(graph.nodes):
        if node not in steps:
            continue
        key = node.target, repr(node.args), repr(node.kwargs), *(repr(node.meta.get(name)) for name in _APART)
        equal = first.setdefault(key, node)
        if equal is not node:
            node.replace_all_uses_with(equal)
            graph.erase_node(node)


def run(graph: fx.Graph) -> None:
    """Eliminates what is computed twice, in place.

    That is everything in an inference graph that has a module, and the quantizations in a training graph.
    """
    if any("tangents" in node.name for node in graph.find_nodes(op="placeholder")):
        _share_quantizations(graph)
    elif graph.owning_module is not None:
        graph.owning_module.graph = fx_graph_cse(graph)
