"""Convolutions of size 1, which are linears of each pixel's channels."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, fx

from fp8fx.graph.hooks import has_hooks
from fp8fx.graph.names import module_path, name_of
from fp8fx.graph.operators import spelling
from fp8fx.graph.values import attribute, fake
from fp8fx.linears.forms import CONVOLUTION, CONVOLUTION_MODULES, bind
from fp8fx.linears.matches import LinearMatch, Refusal
from fp8fx.linears.site import COMPUTED, SHAPE_UNKNOWN, Site, rows
from fp8fx.linears.views import POINTWISE, apply, laid_out

__all__ = ["match_convolution"]


def _is_pointwise(weight: Tensor, arguments: dict[str, Any]) -> bool:
    """Whether a convolution with these arguments looks at one pixel at a time, and at every one."""

    def every(name: str, default: int) -> bool:
        given = arguments.get(name, default)
        return all(x == default for x in (given if isinstance(given, (tuple, list)) else (given,)))

    padded = arguments.get("padding") not in ("valid", "same") and not every("padding", 0)
    return math.prod(weight.shape[2:]) == 1 and every("stride", 1) and every("groups", 1) and not padded


def match_convolution(node: fx.Node, gm: fx.GraphModule, constants: set[fx.Node]) -> LinearMatch | Refusal | None:
    """A convolution of size 1; None for any other."""
    is_module = node.op == "call_module"
    module: Any = attribute(gm, str(node.target)) if is_module else None
    if is_module and (type(module) not in CONVOLUTION_MODULES or not {"weight", "bias"} <= module._parameters.keys()):
        return None
    arguments = bind(node, ("input",) if is_module else CONVOLUTION) or {}
    arguments |= {name: getattr(module, name) for name in ("stride", "padding", "groups")} if is_module else {}
    x, w, bias = arguments.get("input"), arguments.get("weight"), arguments.get("bias")
    weight = module.weight if module is not None else fake(w) if isinstance(w, fx.Node) else None
    if not isinstance(x, fx.Node) or weight is None or not _is_pointwise(weight, arguments):
        return None
    path = str(node.target) if is_module else module_path(node)
    site = Site(node, type(module).__name__ if module is not None else spelling(node), path, constants)
    root = None if is_module or not isinstance(w, fx.Node) else site.weight_behind(w)
    name = f"{path}.weight" if is_module else "" if root is None else name_of(root)
    known, like = fake(x), fake(node)
    if is_module and has_hooks(module):
        return site.refuse("the module has hooks", name)
    if not is_module and root is None:
        return site.refuse(COMPUTED)
    if known is None or (like is None and node.users):
        return site.refuse(SHAPE_UNKNOWN, name)
    if known.dim() != weight.dim():
        return site.refuse("a convolution of a single image", name)
    n, k = weight.shape[:2]
    seen = apply(known, POINTWISE.input)
    made = apply(known.new_empty((*seen.shape[:-1], n)), POINTWISE.output)
    views = (
        POINTWISE if like is None else laid_out(POINTWISE, made, like)
    )  # of a result that nobody reads it is not known
    bias = (None if module.bias is None else node) if module is not None else bias
    target, w = (path, None) if is_module else (None, w)
    return LinearMatch(node, site.form, path, name, x, w, target, False, bias, 1, 1, rows(seen), k, n, weight, views)
