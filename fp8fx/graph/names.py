"""Names of modules, parameters and buffers, as the model has them."""

from __future__ import annotations

import re
from typing import Final

from torch import fx

from fp8fx.torch_internals import source_name, source_of

__all__ = ["HELD", "IN_MODULE", "OWN", "module_path", "name_of"]

HELD = "fp8fx_held"
"""In the meta of a body's input that is a weight, or a view of one, in the graph around the body: its name there."""


OWN: Final = "fp8fx_own"
"""In the meta of a body's input that no input of the call reaches in the graph around the body."""


_ROOT = re.compile(r"^[LG]\['[^']*'\]")


IN_MODULE = re.compile(_ROOT.pattern + r"\._(modules|parameters|buffers)\b")


_PART = re.compile(r"\['?([^'\]]+)'?\]|\.?([^.\[\]]+)")


_CONTAINERS = {"_modules", "_parameters", "_buffers"}


def _dotted(expression: str) -> str:
    """`L['self']._modules['fc']._parameters['weight']` -> `fc.weight`."""
    parts = (a or b for a, b in _PART.findall(_ROOT.sub("", expression)))
    return ".".join(p for p in parts if p not in _CONTAINERS)


def module_path(node: fx.Node) -> str:
    """The path of the module whose forward the node stands in, as `layers.0.mlp`; empty for the root."""
    stack = node.meta.get("nn_module_stack")
    return _dotted(list(stack.values())[-1][0]) if stack else ""


def name_of(node: fx.Node) -> str:
    """The name of a parameter, buffer or constant, as the model's own state dict has it where that can be told."""
    source = source_of(node)
    if source is None or HELD in node.meta:
        return str(node.meta.get(HELD, node.target))
    return _dotted(source_name(source))
