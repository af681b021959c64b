"""Convolutions of size 1, which are linears of each pixel's channels."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, fx, nn

from fp8fx.graph.hooks import has_hooks
from fp8fx.graph.names import name_of
from fp8fx.graph.values import fake
from fp8fx.linears.form import Form, bind
from fp8fx.linears.matches import LinearMatch, MatmulMatch, ModuleMatch, Refusal
from fp8fx.linears.site import NodeKinds, Site, rows
from fp8fx.linears.views import POINTWISE, Views, apply, laid_out
from fp8fx.reasons import Because, CallReason, OperandReason, WeightReason

__all__ = ["match_convolution", "match_convolution_module"]


def _is_pointwise(weight: Tensor, arguments: dict[str, Any]) -> bool:
    """Whether a convolution with these arguments looks at one pixel at a time, and at every one."""

    def every(name: str, default: int) -> bool:
        given = arguments.get(name, default)
        sizes = given if isinstance(given, (tuple, list)) else (given,)
        return all(size == default for size in sizes)

    padded = arguments.get("padding") not in ("valid", "same") and not every("padding", 0)
    return math.prod(weight.shape[2:]) == 1 and every("stride", 1) and every("groups", 1) and not padded


def _why_not(node: fx.Node, x: fx.Node, weight: Tensor) -> Because | None:
    """Why the views around it cannot be told; None if they can."""
    known_x = fake(x)
    if known_x is None or (fake(node) is None and node.users):
        return OperandReason.SHAPE_UNKNOWN()
    if known_x.dim() != weight.dim():
        return CallReason.SINGLE_IMAGE()
    return None


def _seen(node: fx.Node, x: fx.Node, weight: Tensor) -> dict[str, Any]:
    """What both kinds of matches have: the views of a convolution of size 1, sizes, and the weight's value."""
    known_x = fake(x)
    assert known_x is not None
    n, k = weight.shape[:2]
    seen = apply(known_x, POINTWISE.input)
    return {
        "node": node,
        "input": x,
        "tensor": weight,
        "m": rows(seen),
        "k": k,
        "n": n,
        "views": _views(node, seen, n),
    }


def _views(node: fx.Node, seen: Tensor, n: int) -> Views:
    result = fake(node)
    if result is None:  # of a result that nobody reads it is not known
        return POINTWISE
    return laid_out(POINTWISE, apply(seen.new_empty((*seen.shape[:-1], n)), POINTWISE.output), result)


def match_convolution_module(node: fx.Node, form: Form, module: nn.Module) -> LinearMatch | Refusal | None:
    """A call of a convolution of size 1 as a module; None for any other."""
    if type(module) is not form.module or not {"weight", "bias"} <= module._parameters.keys():
        return None
    x = (bind(node.args, node.kwargs, (form.left,)) or {}).get(form.left)
    convolution: Any = module
    arguments = {name: getattr(module, name) for name in ("stride", "padding", "groups")}
    if not isinstance(x, fx.Node) or not _is_pointwise(convolution.weight, arguments):
        return None
    path = str(node.target)
    name = f"{path}.weight"
    written = type(module).__name__
    why = CallReason.HOOKS() if has_hooks(module) else _why_not(node, x, convolution.weight)
    if why is not None:
        return Refusal(node=node, spelling=written, reason=why, path=path, name=name)
    return ModuleMatch(
        form=form,
        spelling=written,
        path=path,
        name=name,
        module=path,
        has_bias=convolution.bias is not None,
        **_seen(node, x, convolution.weight),
    )


def match_convolution(node: fx.Node, form: Form, kinds: NodeKinds) -> LinearMatch | Refusal | None:
    """A call of a convolution of size 1 as a function or an operator; None for any other."""
    arguments = form.bind(node) or {}
    x = arguments.get(form.left)
    weight = arguments.get(form.right)
    bias = None if form.addend is None else arguments.get(form.addend)
    w = fake(weight) if isinstance(weight, fx.Node) else None
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node) or w is None or not _is_pointwise(w, arguments):
        return None
    site = Site.of_call(node, form, kinds)
    root = site.weight_behind(weight)
    if root is None:
        return site.refuse(WeightReason.COMPUTED())
    why = _why_not(node, x, w)
    if why is not None:
        return site.refuse(why, name_of(root))
    return MatmulMatch(
        form=form,
        spelling=site.spelling,
        path=site.path,
        name=name_of(root),
        weight=weight,
        bias=bias,
        **_seen(node, x, w),
    )
