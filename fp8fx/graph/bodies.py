"""The graphs inside higher-order operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fp8fx.graph.copies import copy
from fp8fx.graph.names import NAME_OUTSIDE, OWN, name_of
from fp8fx.graph.values import UNKNOWN, attribute, value
from fp8fx.torch_internals import SET_GRAD_ENABLED, HigherOrderOperator, forward_mode_level, pytree

__all__ = ["FORWARD_MODE", "Body", "bodies", "call_instead", "in_forward_mode"]

# The higher-order operators whose bodies run as if they stood in the graph itself.
_INLINE = {"tag_activation_checkpoint", "cond", "wrap_with_set_grad_enabled", "wrap_with_autocast"}


_INLINE |= {"invoke_subgraph", "while_loop", "scan", "map_impl"}


_STEPS = {"while_loop", "scan"}
"""Those whose gradient keeps what each step has saved in one tensor, written step by step, for which torch has no FP8 kernel."""


FORWARD_MODE = "inside forward-mode differentiation (torch.autograd.forward_ad)"


def in_forward_mode(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that run where forward-mode differentiation is on, around the graph or in it."""
    level, found = forward_mode_level() + 1, set()
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "")
        level += (name == "_enter_dual_level") - (name == "_exit_dual_level")
        if level > 0:
            found.add(node)
    return found


@dataclass(frozen=True)
class Body:
    """A graph inside a higher-order operator of another graph.

    Attributes:
        call: the operator's node.
        name: the attribute of the other graph's module that holds it.
        gm: a copy, whose inputs know which weight is behind them.
        barred: why nothing in it can be FP8; None if there is no reason.
    """

    call: fx.Node
    name: str
    gm: fx.GraphModule
    barred: str | None


def _needs_gradients(gm: fx.GraphModule, operand: fx.Node) -> bool:
    known = attribute(gm, str(operand.target)) if operand.op == "get_attr" else value(operand)
    return known is UNKNOWN or (isinstance(known, Tensor) and known.requires_grad)


def bodies(
    gm: fx.GraphModule, weight_behind: Callable[[fx.Node], fx.Node | None], own: Set[fx.Node] = frozenset()
) -> Iterator[Body]:
    """The graphs inside `gm`'s higher-order operators, as often as they are called.

    `own` are the nodes that no input of the call reaches.
    """
    differentiated, grad = in_forward_mode(gm.graph), torch.is_grad_enabled()
    for node in gm.graph.nodes:
        if node.target is SET_GRAD_ENABLED:
            grad = bool(node.args[0])
        if not isinstance(node.target, HigherOrderOperator) or node.target.name() not in _INLINE:
            continue
        arguments = [a for a in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(a, fx.Node)]
        kind, barred = node.target.name(), FORWARD_MODE if node in differentiated else None
        if kind in _STEPS and grad and any(_needs_gradients(gm, a) for a in arguments):
            barred = f"inside a {kind} that needs gradients: torch cannot store the FP8 tensors of each step"
        for name in [str(a.target) for a in arguments if a.op == "get_attr"]:
            body = attribute(gm, name)
            if not isinstance(body, fx.GraphModule):
                continue
            body = copy(body)
            placeholders = body.graph.find_nodes(op="placeholder")
            for placeholder, operand in zip(
                reversed(placeholders), reversed(arguments), strict=False
            ):  # they come last
                if (weight := weight_behind(operand)) is not None:
                    placeholder.meta[NAME_OUTSIDE] = name_of(weight)
                if operand in own:
                    placeholder.meta[OWN] = True
            yield Body(node, name, body, barred)


def call_instead(body: Body, name: str) -> None:
    """Has the body's own call run what `name` holds."""
    graph, (old,) = (
        body.call.graph,
        {a for a in body.call.all_input_nodes if a.op == "get_attr" and a.target == body.name},
    )
    with graph.inserting_before(body.call):
        body.call.replace_input_with(old, graph.get_attr(name))
    if (
        body.call.target is torch.ops.higher_order.invoke_subgraph
    ):  # AOTAutograd takes bodies of one identifier for the same
        body.call.update_arg(1, name)
    if not old.users:
        graph.erase_node(old)
