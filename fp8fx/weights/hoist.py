"""What the body of a higher-order operator reads of FP8 weights is read in front of the call, and handed in.

   checkpoint(body, x, W)                 body(x, W): matmul_fp8(x, t(W.qdata), b_scale=W.scale)
-> checkpoint(body, x, W.qdata, W.scale)  body(x, qdata, scale): matmul_fp8(x, t(qdata), b_scale=scale)
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from fp8fx.graph.values import value
from fp8fx.ops.fp8_weight import FP8Weight
from fp8fx.weights.side_by_side import side_by_side

__all__ = ["hoist", "reads_of_weights"]


def reads_of_weights(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that read the data or the scale of FP8 weights, which are inputs."""
    return [node for node in graph.nodes if node.op == "call_function" and _reads_weights(node)]


def _reads_weights(node: fx.Node) -> bool:
    """Whether it reads a weight's parts: Dynamo also writes `weight.T` as a getattr."""
    reads_part = node.target is getattr and node.args[1] in ("qdata", "scale")
    if not reads_part and node.target is not side_by_side:
        return False
    return all(source.op == "placeholder" and isinstance(value(source), FP8Weight) for source in node.all_input_nodes)


def _outside(read: fx.Node, operands: dict[fx.Node, fx.Node], graph: fx.Graph) -> fx.Node:
    """The read in front of the call, where these operands take the place of the body's inputs."""
    args = fx.map_arg(read.args, operands.__getitem__)
    for node in reads_of_weights(graph):
        if node.target is read.target and node.args == args:
            return node
    last = [*graph.find_nodes(op="placeholder"), *reads_of_weights(graph)][-1]
    with graph.inserting_after(last):
        new = graph.call_function(read.target, args)  # type: ignore[arg-type]
    new.meta = {**read.meta}
    return new


def hoist(body: fx.GraphModule, calls: Sequence[fx.Node]) -> bool:
    """Takes what reads weights out of a body, in place, and hands it to each of the body's calls.

    Args:
        body: the graph inside an operator with flat inputs.
        calls: the operator's nodes of one graph that call it.

    Returns:
        Whether there was anything.
    """
    graph = body.graph
    reads = reads_of_weights(graph)
    if not reads:
        return False
    inputs = graph.find_nodes(op="placeholder")
    weights = {source for read in reads for source in read.all_input_nodes}
    unread = {weight for weight in weights if all(user in reads for user in weight.users)}
    for call in calls:
        others = call.args[: -len(inputs)]
        operands = dict(zip(inputs, call.args[-len(inputs) :], strict=True))
        handed_in = [_outside(read, operands, call.graph) for read in reads]
        call.args = *others, *(operands[node] for node in inputs if node not in unread), *handed_in
    last = inputs[-1]
    for read in reads:
        with graph.inserting_after(last):
            last = graph.placeholder(read.name)
        last.meta = {**read.meta}
        read.replace_all_uses_with(last)
    for node in (*reads, *unread):
        graph.erase_node(node)
    body.recompile()
    return True
