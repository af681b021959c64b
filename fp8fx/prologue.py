"""What a graph reads of FP8 weights: read in each call, in Python, in front of the compiled graph.

    f(x, W)                                             -> f(x, W.qdata, W.scale), compiled
        matmul_fp8(x, t(W.qdata), b_scale=W.scale)             matmul_fp8(x, t(qdata), b_scale=scale)

So the compiled graph has plain tensors as inputs: AOTAutograd takes nothing apart in each call, and a weight that was
moved, loaded or written to since is read as it is now.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from fp8fx.graph.values import value
from fp8fx.torch_internals import (
    AttrSource,
    ConstantSource,
    disable_current_modes,
    set_source,
    source_of,
)
from fp8fx.weights.hoist import reads_of_weights

__all__ = ["split"]

_STATIC = "_dynamo_static_input_type"


def _become_input(node: fx.Node, last: fx.Node) -> fx.Node:
    """The input that takes the place of a node, behind the `last` one."""
    graph = node.graph
    with graph.inserting_after(last):
        new = graph.placeholder(node.name)
    root = node.all_input_nodes[0]
    # A weight of the model keeps its address from call to call: a CUDA graph need not copy it.
    new.meta = {"example_value": value(node), "tensor_dict": {**root.meta.get("tensor_dict", {})}}
    source = source_of(root)
    if source is not None:
        is_attribute = node.target is getattr
        set_source(new, AttrSource(source, str(node.args[1])) if is_attribute else ConstantSource(f"fp8fx.{node.name}"))
    node.replace_all_uses_with(new)
    return new


def split(
    gm: fx.GraphModule, example_inputs: Sequence[Any]
) -> tuple[Sequence[Any], Callable[..., tuple[Any, ...]] | None]:
    """Takes what reads FP8 weights out of the graph.

    Args:
        gm: the rewritten graph, which becomes one of plain tensors, in place.
        example_inputs: what it is called with.

    Returns:
        What the new graph is called with, and what gives that of the arguments of a call; None if there is nothing to
        read.
    """
    graph = gm.graph
    early = reads_of_weights(graph)
    if not early:
        return example_inputs, None
    placeholders = graph.find_nodes(op="placeholder")
    ahead = fx.Graph()
    copies = {node: ahead.placeholder(node.name) for node in placeholders}
    for node in early:
        copies[node] = ahead.node_copy(node, copies.__getitem__)
    read = [node for node in early if any(user not in early for user in node.users)]
    weights = {source for node in early for source in node.all_input_nodes if source.op == "placeholder"}
    unread = [node for node in weights if all(user in early for user in node.users)]
    kept = [node for node in placeholders if node not in unread]
    ahead.output(tuple(copies[node] for node in (*kept, *read)))
    last = placeholders[-1]
    for node in read:
        last = _become_input(node, last)
    for node in reversed(early):
        graph.erase_node(node)
    for node in unread:
        graph.erase_node(node)
    gm.recompile()
    prologue: Callable[..., tuple[Any, ...]] = fx.GraphModule({}, ahead).forward
    with disable_current_modes():
        return prologue(*example_inputs), prologue
