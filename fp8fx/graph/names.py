"""Names of modules, parameters and buffers, as the model has them."""

from __future__ import annotations

import re
from typing import Final

from torch import fx

from fp8fx.torch_internals import source_name, source_of

__all__ = ["MASK", "NAME_OUTSIDE", "OWN", "input_name", "module_path", "name_of"]

NAME_OUTSIDE: Final = "fp8fx_name_outside"
"""In the meta of a body's input that is a weight, or a view of one, in the graph around the body: its name there."""

OWN: Final = "fp8fx_own"
"""In the meta of a body's input that no input of the call reaches in the graph around the body."""

MASK: Final = "fp8fx_mask"
"""In the meta of a body's input, and of what the call gives it: what that hides as a mask, or why it is not known."""

_ROOT = re.compile(r"^[LG]\['([^']*)'\]")
_PART = re.compile(r"\['?([^'\]]+)'?\]|\.?([^.\[\]]+)")
_CONTAINERS = {"_modules", "_parameters", "_buffers"}


def _dotted(expression: str) -> str:
    """`L['self']._modules['fc']._parameters['weight']` -> `fc.weight`."""
    parts = (quoted or plain for quoted, plain in _PART.findall(_ROOT.sub("", expression)))
    return ".".join(part for part in parts if part not in _CONTAINERS)


def module_path(node: fx.Node) -> str:
    """The path of the module whose forward the node stands in, such as `layers.0.mlp`; empty for the root."""
    stack = node.meta.get("nn_module_stack")
    return _dotted(list(stack.values())[-1][0]) if stack else ""


def name_of(node: fx.Node) -> str:
    """The name of a parameter, buffer or constant: the model's state dict's own, if that can be told."""
    if NAME_OUTSIDE in node.meta:
        return str(node.meta[NAME_OUTSIDE])
    source = source_of(node)
    return str(node.target) if source is None else _dotted(source_name(source))


def input_name(node: fx.Node) -> str:
    """The name of an argument of the call, or of the part of it that an input of the graph is."""
    source = source_of(node)
    if source is None:
        return str(node.target)
    expression = source_name(source)
    root = _ROOT.match(expression)
    return _dotted(expression) or (root[1] if root else expression)
