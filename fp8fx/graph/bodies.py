"""The graphs inside higher-order operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fp8fx.graph.copies import copy
from fp8fx.graph.names import MASK, NAME_OUTSIDE, OWN, name_of
from fp8fx.graph.values import UNKNOWN, attribute, value
from fp8fx.ops.fp8_weight import FP8Weight
from fp8fx.reasons import Because, PlaceReason
from fp8fx.torch_internals import SET_GRAD_ENABLED, HigherOrderOperator, forward_mode_level, pytree

__all__ = ["Body", "bodies", "call_instead", "has_flat_inputs", "in_forward_mode"]

_STEPS = frozenset({"while_loop", "scan"})
"""Operators whose gradient needs a tensor that each step writes its part of, for which torch has no FP8 kernel."""

_FLAT = frozenset({"invoke_subgraph", "tag_activation_checkpoint", "wrap_with_autocast", "wrap_with_set_grad_enabled"})
"""Operators of one body, whose inputs are their last arguments."""

_INLINE = _STEPS | _FLAT | {"cond", "map_impl"}
"""The higher-order operators whose bodies run as if they stood in the graph itself."""


def has_flat_inputs(node: fx.Node) -> bool:
    """Whether a node calls one body, whose inputs are the last of the node's arguments."""
    return isinstance(node.target, HigherOrderOperator) and node.target.name() in _FLAT


def in_forward_mode(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that run while forward-mode differentiation is on, around the graph or in it."""
    level = forward_mode_level() + 1
    differentiated = set[fx.Node]()
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "")
        if name == "_enter_dual_level":
            level += 1
        elif name == "_exit_dual_level":
            level -= 1
        if level > 0:
            differentiated.add(node)
    return differentiated


@dataclass(frozen=True)
class Body:
    """A graph inside a higher-order operator of another graph.

    Attributes:
        call: the operator's node.
        name: the attribute of the other graph's module that holds the body.
        gm: a copy of it, whose inputs know which weight is behind them.
        barred: why nothing in it can be FP8; None if there is no reason.
    """

    call: fx.Node
    name: str
    gm: fx.GraphModule
    barred: Because | None


def _needs_gradients(gm: fx.GraphModule, operand: fx.Node) -> bool:
    """Whether autograd will ask for the operand's gradient; True if its value is not known."""
    x = attribute(gm, str(operand.target)) if operand.op == "get_attr" else value(operand)
    return x is UNKNOWN or (isinstance(x, Tensor) and x.requires_grad)


def _mark_inputs(
    body: fx.GraphModule,
    operands: Sequence[fx.Node],
    weight_behind: Callable[[fx.Node], fx.Node | None],
    own: Set[fx.Node],
) -> None:
    """Tells the body's inputs which weight is behind them, whether they are the model's own, and what masks hide."""
    placeholders = body.graph.find_nodes(op="placeholder")
    # The body's inputs are the last of the call's arguments.
    for placeholder, operand in zip(reversed(placeholders), reversed(operands), strict=False):
        weight = weight_behind(operand)
        if weight is not None:
            placeholder.meta[NAME_OUTSIDE] = name_of(weight)
        if operand in own:
            placeholder.meta[OWN] = True
        if MASK in operand.meta:
            placeholder.meta[MASK] = operand.meta[MASK]


def _dequantize_inputs(body: fx.GraphModule) -> None:
    """Tells the body's inputs that an FP8 weight is dequantized before the call."""
    for placeholder in body.graph.find_nodes(op="placeholder"):
        x: Any = value(placeholder)
        if isinstance(x, FP8Weight):
            placeholder.meta["example_value"] = x.dequantize()


def bodies(
    gm: fx.GraphModule, weight_behind: Callable[[fx.Node], fx.Node | None], own: Set[fx.Node] = frozenset()
) -> Iterator[Body]:
    """The graphs inside `gm`'s higher-order operators, once for each call.

    Args:
        gm: the graph that calls them.
        weight_behind: the node of the weight that a node is a view of; None if there is no weight behind it.
        own: the nodes that no input of the call reaches.
    """
    differentiated = in_forward_mode(gm.graph)
    grad_mode = torch.is_grad_enabled()
    for node in gm.graph.nodes:
        if node.target is SET_GRAD_ENABLED:
            grad_mode = bool(node.args[0])
        if not isinstance(node.target, HigherOrderOperator) or node.target.name() not in _INLINE:
            continue
        arguments = [a for a in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(a, fx.Node)]
        operator = node.target.name()
        barred = PlaceReason.FORWARD_MODE() if node in differentiated else None
        if operator in _STEPS and grad_mode and any(_needs_gradients(gm, a) for a in arguments):
            barred = PlaceReason.STEPS(operator=operator)
        for name in [str(a.target) for a in arguments if a.op == "get_attr"]:
            original = attribute(gm, name)
            if not isinstance(original, fx.GraphModule):
                continue
            body = copy(original)
            _mark_inputs(body, arguments, weight_behind, own)
            if not has_flat_inputs(node):
                _dequantize_inputs(body)
            yield Body(node, name, body, barred)


def call_instead(body: Body, name: str) -> None:
    """Has the body's own call run what `name` holds."""
    call = body.call
    graph = call.graph
    (old,) = (a for a in call.all_input_nodes if a.op == "get_attr" and a.target == body.name)
    with graph.inserting_before(call):
        call.replace_input_with(old, graph.get_attr(name))
    if call.target is torch.ops.higher_order.invoke_subgraph:
        call.update_arg(1, name)  # AOTAutograd takes bodies of one identifier for the same
    if not old.users:
        graph.erase_node(old)
