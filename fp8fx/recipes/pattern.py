"""What `quantize` is in Inductor's graphs, for the passes that look for it. It changes with the arithmetic beside it.

    scale = float(clamp(div(double(amax(abs(x))), target)))    per tensor, row or block
    r     = float(reciprocal(double(scale)))
    x8    = cast(mul(float(x), r))                             a float32 x needs no float

`float`, `double` and `cast` are `prims.convert_element_type`. Views may stand between any two of these. If a row has
several blocks, x is padded, r has a dimension more and x8 is a slice: the pattern ends at these.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from fp8fx.recipes.formats import E4M3, E5M2

__all__ = [
    "FP8_DTYPES",
    "amax_of_tensor",
    "begins_cast",
    "behind_views",
    "behind_views_and_copies",
    "cast_from",
    "casts_stored",
    "inverses_of_scales",
    "is_view",
    "quantizations",
    "readers",
]

aten, prims = torch.ops.aten, torch.ops.prims

FP8_DTYPES = (E4M3.dtype, E5M2.dtype)
"""The dtypes of quantized values."""


_CONVERT = prims.convert_element_type.default
_MULTIPLY = aten.mul.Tensor
_RECIPROCAL = aten.reciprocal.default

_VIEWS = (aten.permute.default, aten.t.default, aten.view.default, aten.reshape.default)

_VIEWS_AND_COPIES = (*_VIEWS, aten.clone.default)

_STEPS = {
    _CONVERT,
    _MULTIPLY,
    _RECIPROCAL,
    *_VIEWS,
    aten.abs.default,
    aten.amax.default,
    aten.clamp.default,
    aten.clamp_min.default,
    aten.div.Tensor,
}


def is_view(node: fx.Node) -> bool:
    """Whether it gives the values of its first argument in another shape or order."""
    return node.target in _VIEWS


def _behind(node: Any, targets: tuple[Any, ...]) -> Any:
    while isinstance(node, fx.Node) and node.target in targets:
        node = node.args[0]
    return node


def behind_views(node: Any) -> Any:
    """What `node` is a view of. An argument that is no node comes back as it is."""
    return _behind(node, _VIEWS)


def behind_views_and_copies(node: Any) -> Any:
    """What `node` is a view or a copy of, as `behind_views`."""
    return _behind(node, _VIEWS_AND_COPIES)


def readers(node: fx.Node) -> Iterator[fx.Node]:
    """What reads `node`, as it is or through views."""
    for user in node.users:
        if is_view(user):
            yield from readers(user)
        else:
            yield user


def _is_cast(node: fx.Node) -> bool:
    return node.target is _CONVERT and node.args[1] in FP8_DTYPES


def quantizations(graph: fx.Graph) -> set[fx.Node]:
    """The nodes of all quantizations: every cast to FP8, and what it is computed of."""
    pending = [node for node in graph.find_nodes(op="call_function", target=_CONVERT) if _is_cast(node)]
    steps = set[fx.Node]()
    while pending:
        node = pending.pop()
        if node.target in _STEPS and node not in steps:
            steps.add(node)
            pending += node.all_input_nodes
    return steps


def amax_of_tensor(node: fx.Node) -> fx.Node | None:
    """The magnitudes, abs(x), of which `node` is the largest in a whole tensor; None if it is not that."""
    if node.target is not aten.amax.default or len(node.args) > 1 or node.kwargs:
        return None
    magnitudes = node.args[0]
    if not isinstance(magnitudes, fx.Node) or magnitudes.target is not aten.abs.default:
        return None
    return magnitudes


def _is_inverse_of_scale(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() > 0:
        return False
    return getattr(node.args[0], "target", None) is _RECIPROCAL


def inverses_of_scales(graph: fx.Graph) -> list[fx.Node]:
    """Every r of a scale per tensor."""
    converted = graph.find_nodes(op="call_function", target=_CONVERT)
    return [node for node in converted if _is_inverse_of_scale(node)]


def begins_cast(node: fx.Node) -> bool:
    """Whether `node` is the first step from x to x8: float(x), or mul(x, r) of a float32 x."""
    products = node.users if node.target is _CONVERT else (node,)
    return any(_is_cast(user) for product in products if product.target is _MULTIPLY for user in product.users)


def casts_stored(node: fx.Node) -> bool:
    """Whether `node`, which reads r, casts an x that is an input of the graph: it lies in memory."""
    source = node.args[0] if node.target is _MULTIPLY else node
    source = _behind(source, (_CONVERT, *_VIEWS))
    return isinstance(source, fx.Node) and source.op == "placeholder"


def cast_from(operand: Any) -> Any:
    """The x that an FP8 operand of a GEMM was cast from, without views and copies; None if no cast made it."""
    cast = behind_views_and_copies(operand)
    if not isinstance(cast, fx.Node) or not _is_cast(cast):
        return None
    product = behind_views_and_copies(cast.args[0])
    if getattr(product, "target", None) is not _MULTIPLY:
        return None
    x = behind_views_and_copies(product.args[0])
    is_float = getattr(x, "target", None) is _CONVERT
    return behind_views_and_copies(x.args[0]) if is_float else x
