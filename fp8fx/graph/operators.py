"""Which operator a node calls, and what kind of operator that is.

One operator has many spellings: `torch.mm(x, w)`, `x.mm(w)`, `aten.mm(x, w)`, `aten.mm.default(x, w)`; `w.T` is a
getattr in one release of torch and `aten.numpy_T(w)` in the next. All of them have one name here, that of the ATen
operator. What an operator does with its arguments' memory is read from its schema, and not from a list of names.
"""

from __future__ import annotations

import functools
import operator
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fp8fx.torch_internals import FUNCTIONS, OpOverload, OpOverloadPacket, schema_of

__all__ = [
    "called",
    "copies_first",
    "is_known",
    "is_operator",
    "name_of_operator",
    "overloads",
    "spelling",
    "tags",
    "views_first",
]

_PLACES: tuple[Any, ...] = (torch, F, torch.functional, *FUNCTIONS, Tensor, operator)
"""Where torch's functions and Python's operators are found by their names. From elsewhere it is another function."""


_SAME = {
    "imatmul": "matmul",  # tensors have none of their own: `x @= w` is `x = x @ w`
    "linalg_matmul": "matmul",
    "_grouped_mm": "grouped_mm",
    "multi_dot": "linalg_multi_dot",
    "T": "numpy_T",
    "H": "matrix_H",
    "data": "detach",
    "_get_data_attr": "detach",  # as Dynamo writes `.data`
}
"""Other names of an operator."""


def is_operator(target: Any) -> bool:
    """Whether it is an operator of torch.ops, with or without its overload."""
    return isinstance(target, (OpOverload, OpOverloadPacket))


def is_known(target: Any) -> bool:
    """Whether a function is one that goes by its name: torch's or Python's own."""
    module = getattr(target, "__module__", None) or "torch"
    return module.partition(".")[0] in ("torch", "_operator", "builtins", "math", "einops")


def _function_name(function: Callable[..., Any]) -> str:
    """The name of a function of torch's or Python's; empty for any other."""
    if isinstance(function, types.MethodWrapperType):  # `Tensor.T.__get__`, which reads an attribute
        return str(getattr(function.__self__, "__name__", "")) if function.__name__ == "__get__" else ""
    name = str(getattr(function, "__name__", ""))
    if getattr(F, name, None) is function and hasattr(Tensor, name):
        return ""  # may be another operator than the method, as F.unfold is
    return name if any(getattr(place, name, None) is function for place in _PLACES) else ""


@functools.cache
def name_of_operator(target: Any) -> str:
    """The name of the operator that a node's target is, as `addmm`; empty if it is none that is known.

    Args:
        target: a function, the name of a method or attribute, or one of torch.ops with or without its overload.
    """
    if is_operator(target):
        packet = target if isinstance(target, OpOverloadPacket) else target.overloadpacket
        namespace, _, name = str(packet).partition(".")
        if namespace not in ("aten", "prims"):
            return ""
    else:
        name = target if isinstance(target, str) else _function_name(target)
    if name.startswith("__") and name.endswith("__"):
        name = name.strip("_")
    return _SAME.get(name, name)


def called(node: fx.Node) -> str:
    """The name of the operator that a node calls; empty if it calls none that is known."""
    if node.target is getattr and len(node.args) > 1:
        return name_of_operator(str(node.args[1]))
    return name_of_operator(node.target) if node.op in ("call_function", "call_method") else ""


def spelling(node: fx.Node) -> str:
    """How a call is written, for people to read: `F.linear`, `aten.linear`, `.mm`, `@`."""
    target: Any = node.target
    if is_operator(target):
        return str(target if isinstance(target, OpOverloadPacket) else target.overloadpacket)
    name = target if isinstance(target, str) else target.__name__
    if target is operator.imatmul:
        return "@="
    if target is operator.matmul or name in ("__matmul__", "__rmatmul__"):
        return "@"
    if node.op == "call_method":
        return f".{name}"
    return "F.linear" if target is F.linear else str(name).lstrip("_").replace("linalg_", "linalg.")


@functools.cache
def overloads(target: Any) -> tuple[OpOverload, ...]:
    """The operators that a function or method may be, by its name if it is none itself."""
    if isinstance(target, OpOverload):
        return (target,)
    packet = target
    if not isinstance(target, OpOverloadPacket):
        name = target if isinstance(target, str) else getattr(target, "__name__", "")
        packet = getattr(torch.ops.aten, name, None)
    if not isinstance(packet, OpOverloadPacket):
        return ()
    return tuple(getattr(packet, overload) for overload in packet.overloads())


@functools.cache
def tags(target: Any) -> frozenset[torch.Tag]:
    """What torch says of the operators that a function or method may be."""
    return frozenset(tag for overload in overloads(target) for tag in overload.tags)


def _returns_first(overload: OpOverload) -> bool:
    """Whether the result is the first argument's memory, which the call does not change."""
    schema = schema_of(overload)
    first = schema.arguments[0].alias_info if schema.arguments else None
    if first is None or first.is_write:
        return False
    results = [result.alias_info.before_set for result in schema.returns if result.alias_info is not None]
    return any(memory <= first.before_set for memory in results)  # that of `cpu` may also be other memory


def _overloads_called(node: fx.Node) -> tuple[OpOverload, ...]:
    return overloads(node.target if is_operator(node.target) else called(node))


def views_first(node: fx.Node) -> bool:
    """Whether a call gives a view of its first argument, of other strides, sizes or dtype."""
    return called(node) == "getitem" or any(map(_returns_first, _overloads_called(node)))


_COPIES = {
    "clone",
    "contiguous",
    "unsafe_chunk",
    "unsafe_split",
    "unsafe_split_with_sizes",
    "_unsafe_view",
    "lift_fresh_copy",
}


def copies_first(node: fx.Node) -> bool:
    """Whether a call gives a copy of its first argument's values, all or some of them and unchanged."""
    name = called(node)
    return name in _COPIES or (
        name.endswith("_copy") and any(torch.Tag.view_copy in overload.tags for overload in _overloads_called(node))
    )
