"""Which nodes hold the model's own tensors, and what is computed of these alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fp8fx.graph.names import NAME_OUTSIDE
from fp8fx.graph.operators import is_known, tags
from fp8fx.graph.values import attribute, value
from fp8fx.torch_internals import (
    FakeTensor,
    is_module_source,
    source_of,
)

__all__ = ["computed", "constants", "expression", "repeats", "tensors"]


def _from_outside(node: fx.Node) -> bool:
    """Whether the input comes from a module, a global or a closure, rather than from the call's arguments."""
    source: Any = source_of(node)
    if NAME_OUTSIDE in node.meta:
        return True
    if source is None:  # of a part of Dynamo's graph, as DDPOptimizer splits it
        return "_dynamo_static_input_type" in node.meta.get("tensor_dict", {})
    if is_module_source(source):
        return True
    while hasattr(source, "base"):
        source = source.base
    if type(source).__name__ == "GlobalSource":
        return True
    # An argument that an inner function reads, such as a generator expression, is in a cell too.
    return bool(getattr(source, "is_derefed_cell_contents", False)) and not getattr(source, "is_input", False)


def constants(gm: fx.GraphModule, example_inputs: Sequence[Any] | None) -> set[fx.Node]:
    """The nodes that hold a parameter, a buffer or a constant tensor, whether as an attribute or lifted to an input."""
    nodes = {n for n in gm.graph.find_nodes(op="get_attr") if isinstance(attribute(gm, n.target), Tensor)}
    placeholders = gm.graph.find_nodes(op="placeholder")
    examples = itertools.chain(example_inputs or (), itertools.repeat(None))
    for node, example in zip(placeholders, examples, strict=False):
        if any(isinstance(x, nn.Parameter) for x in (example, value(node))) or _from_outside(node):
            nodes.add(node)
    return nodes


def tensors(gm: fx.GraphModule, example_inputs: Sequence[Any] | None) -> dict[fx.Node, Tensor]:
    """The tensor itself behind each node that reads an attribute or is an input, if more than a fake one is known."""
    values: dict[fx.Node, Any] = {node: attribute(gm, str(node.target)) for node in gm.graph.find_nodes(op="get_attr")}
    values |= zip(gm.graph.find_nodes(op="placeholder"), example_inputs or (), strict=False)
    return {node: x for node, x in values.items() if isinstance(x, Tensor) and not isinstance(x, FakeTensor)}


def computed(gm: fx.GraphModule, constants: set[fx.Node]) -> set[fx.Node]:
    """The nodes that depend on `constants` alone: weights made of weights."""
    nodes = set(constants)
    for node in gm.graph.nodes:
        if node.op.startswith("call_") and node.all_input_nodes and nodes.issuperset(node.all_input_nodes):
            nodes.add(node)
    return nodes - constants


def repeats(node: fx.Node) -> bool:
    """Whether a call computes the same of the same: it draws no random numbers, and is torch's."""
    if node.op == "call_module" or (node.op == "call_function" and not is_known(node.target)):
        return False
    return torch.Tag.nondeterministic_seeded not in tags(node.target)


def expression(node: fx.Node, constants: set[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]] | None:
    """What `node` is computed of: the constants, and the nodes from there to `node`, both in the graph's order.

    None if it is computed of more, or may differ from call to call.
    """
    pending = [node]
    seen = {node}
    while pending:
        current = pending.pop()
        if current in constants:
            continue
        if not current.op.startswith("call_") or not current.all_input_nodes or not repeats(current):
            return None
        pending += [source for source in current.all_input_nodes if source not in seen]
        seen.update(current.all_input_nodes)
    ordered = sorted(seen)
    return [n for n in ordered if n in constants], [n for n in ordered if n not in constants]
