"""Which nodes of a graph change which tensors in place."""

from __future__ import annotations

import functools
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Set
from typing import Any

import torch
from torch import fx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from fp8fx.forms import is_called_view
from fp8fx.graph import attribute, fake

__all__ = ["changed", "root", "writes"]

_OPERATORS = ("add", "and", "floordiv", "lshift", "matmul", "mod", "mul", "or", "pow", "rshift", "sub", "truediv", "xor")
_IN_PLACE = {name for x in _OPERATORS for name in (f"i{x}", f"__i{x}__")} | {"setitem", "__setitem__"}


@functools.cache
def _position(target: Callable[..., Any], name: str) -> int | None:
    """Where a function takes the argument of that name; None where it does not, or does not say."""
    try:
        names = list(inspect.signature(target).parameters)
    except (TypeError, ValueError):
        return None
    return names.index(name) if name in names else None


def _given(node: fx.Node, name: str) -> Any:
    """An argument of a function that is written in Python."""
    at = _position(node.target, name) if node.op == "call_function" else None
    return node.args[at] if at is not None and at < len(node.args) else node.kwargs.get(name)


def _in_place(node: fx.Node, gm: fx.GraphModule) -> bool:
    """Whether the node changes its first argument and returns it, as far as its name and arguments tell."""
    if node.op == "call_module":
        return bool(getattr(attribute(gm, str(node.target)), "inplace", False))
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable and node.target._opname.endswith("_")
    name = getattr(node.target, "__name__", str(node.target))
    return (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE or bool(_given(node, "inplace"))


def root(node: Any, gm: fx.GraphModule) -> Any:
    """What a node is a view of, or is, as far as the names of what it calls tell."""
    while isinstance(node, fx.Node) and node.args and (is_called_view(node) or _in_place(node, gm)):
        node = node.args[0]
    return node


def _by_schema(node: fx.Node, schema: torch.FunctionSchema) -> Iterator[Any]:
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)


def _by_bodies(node: fx.Node, gm: fx.GraphModule) -> Iterator[Any]:
    """The operands that a higher-order operator's bodies change; without bodies to look into, all."""
    operands = node.all_input_nodes
    held = [attribute(gm, str(x.target)) for x in operands if x.op == "get_attr"]
    bodies = [body for body in held if isinstance(body, fx.GraphModule)]
    if not bodies:
        yield from operands
    for body in bodies:
        placeholders = body.graph.find_nodes(op="placeholder")
        arguments = [x for x in tree_leaves((node.args, node.kwargs)) if isinstance(x, fx.Node)]
        inside = set[fx.Node]().union(*writes(body, set(placeholders)).values())
        yield from (x for x, own in zip(reversed(arguments), reversed(placeholders), strict=False) if own in inside)  # they come last


def changed(node: fx.Node, gm: fx.GraphModule) -> set[fx.Node]:
    """What the node may change in place: its operands, which may be views of others."""
    if not node.op.startswith("call_"):
        return set()
    target, found = node.target, list[Any]()
    if isinstance(target, torch._ops.HigherOrderOperator):
        found = list(_by_bodies(node, gm))
    elif isinstance(target, torch._ops.OpOverload):
        found = list(_by_schema(node, target._schema))
    elif isinstance(target, torch._ops.OpOverloadPacket):
        found = [x for name in target.overloads() for x in _by_schema(node, getattr(target, name)._schema)]
    elif _in_place(node, gm):
        found = [*node.args[:1], node.kwargs.get("input")]
    elif target is torch.nn.functional.embedding and _given(node, "max_norm") is not None:
        found = [_given(node, "weight")]  # it is renormalized
    return {x for x in tree_leaves((found, node.kwargs.get("out"))) if isinstance(x, fx.Node)}


def _storage(node: fx.Node) -> StorageWeakRef | None:
    """The memory of the node's value, where that is known."""
    known = fake(node)
    return None if known is None or known.layout is not torch.strided else StorageWeakRef(known.untyped_storage())


def writes(gm: fx.GraphModule, held: Set[fx.Node]) -> dict[fx.Node, set[fx.Node]]:
    """By the node that does it, which of the tensors `held` are changed in place, as a whole or through any view of them.

    The nodes' values, where known, are in their meta (`graph.propagate`): views share their memory.
    """
    at, found = defaultdict[StorageWeakRef | None, set[fx.Node]](set), dict[fx.Node, set[fx.Node]]()
    for node in held:
        at[_storage(node)].add(node)
    for node in gm.graph.nodes:
        hit = set[fx.Node]()
        for x in changed(node, gm):
            memory = _storage(x)
            hit |= {root(x, gm)} & held if memory is None else at[memory]
        if hit:
            found[node] = hit
    return found
