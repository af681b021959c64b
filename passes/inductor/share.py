"""share: two equal quantizations -> one, on Inductor's graph, before forward and backward part.

    q1 = quantize(x); q2 = quantize(x)  ->  q1 = q2 = quantize(x)

AOTAutograd runs no such elimination on inference graphs, where q, k and v would each quantize the same input. On training graphs it leaves
apart, from torch 2.15 on, what backward reads and what it does not: LoRA's frozen linear and its first factor would each quantize their
input. There this pass touches quantizations alone; what a model computes twice stays torch's to decide.
"""

from __future__ import annotations

import torch
from torch import fx

from fp8fx.recipes.formats import E4M3, E5M2
from fp8fx.torch_internals import fx_graph_cse

__all__ = ["run"]

aten, prims = torch.ops.aten, torch.ops.prims


_FP8 = (E4M3.dtype, E5M2.dtype)


# What a quantization is made of.
_CAST = prims.convert_element_type.default


_VIEWS = (aten.permute.default, aten.reshape.default, aten.t.default, aten.view.default)


_SCALING = (
    aten.abs.default,
    aten.amax.default,
    aten.clamp.default,
    aten.clamp_min.default,
    aten.div.Tensor,
    aten.mul.Tensor,
)


_STEPS = {_CAST, *_VIEWS, *_SCALING, aten.reciprocal.default}


_APART = ("partitioner_tag", "recompute", "ac_graph_id", "custom")
"""In a node's meta: what backward and checkpointing compute anew, to save memory, and on which stream a node runs."""


def _steps(graph: fx.Graph) -> set[fx.Node]:
    """The nodes of all quantizations: every cast to FP8, and what it is computed of."""
    pending = [node for node in graph.find_nodes(op="call_function", target=_CAST) if node.args[1] in _FP8]
    steps = set[fx.Node]()
    while pending:
        node = pending.pop()
        if node.target in _STEPS and node not in steps:
            steps.add(node)
            pending += node.all_input_nodes
    return steps


def _behind_outputs(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose memory an output has. The caller may write to it, so that no two of these are one."""
    pending, found = list(graph.output_node().all_input_nodes), set[fx.Node]()
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += node.all_input_nodes if node.target in _VIEWS else []
    return found


def _share_quantizations(graph: fx.Graph) -> None:
    steps, first = _steps(graph) - _behind_outputs(graph), dict[object, fx.Node]()
    for node in list(graph.nodes):
        if node not in steps:
            continue
        key = node.target, repr(node.args), repr(node.kwargs), *(repr(node.meta.get(name)) for name in _APART)
        if node is not (same := first.setdefault(key, node)):
            node.replace_all_uses_with(same)
            graph.erase_node(node)


def run(graph: fx.Graph) -> None:
    """Eliminates what is computed twice, in place: all of an inference graph that has a module, and of a training graph quantizations."""
    if any("tangents" in node.name for node in graph.find_nodes(op="placeholder")):
        _share_quantizations(graph)
    elif graph.owning_module is not None:
        graph.owning_module.graph = fx_graph_cse(graph)
