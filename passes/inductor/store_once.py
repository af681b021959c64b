"""store_once: what several GEMMs read is written to memory once, on Inductor's final graph.

    x8 = cast(x); scaled_mm(x8, v); scaled_mm(x8, w)             ->  x8 is marked: Inductor writes it before anything reads it
    g = f(...); mm(t(g), a); scaled_mm(cast(g), w8)              ->  g is marked

Inductor inlines a pointwise operand into each `_scaled_mm` and writes it once for each; it does not for `mm`. And what it has not
written yet when it meets a cast, it computes again for the cast: a gradient that wgrad reads in high precision and dgrad in FP8.

A mark asks for strides only if they are numbers. Those of an expanded gradient are no layout to write in: it is not marked.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from fp8fx.recipes.formats import E4M3, E5M2
from fp8fx.torch_internals import REALIZE, SCALED_MM

__all__ = ["run"]

aten, prims = torch.ops.aten, torch.ops.prims


_FP8 = (E4M3.dtype, E5M2.dtype)


_VIEWS = (aten.permute.default, aten.t.default, aten.view.default, aten.reshape.default)


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """What reads `node`, as it is or through a view."""
    for user in node.users:
        if user.target in _VIEWS:
            yield from _readers(user)
        else:
            yield user


def _is_cast(node: fx.Node) -> bool:
    """Whether `node` is the first of cast(mul(float(x), r)); a float32 x needs no float."""
    products = node.users if node.target is prims.convert_element_type.default else (node,)
    casts = (user for mul in products if mul.target is aten.mul.Tensor for user in mul.users)
    return any(user.target is prims.convert_element_type.default and user.args[1] in _FP8 for user in casts)


def _is_shared(node: fx.Node, dtype: torch.dtype) -> bool:
    """Whether several GEMMs read `node`: as FP8, or one in high precision and one by a cast."""
    readers = set(_readers(node))
    gemms = [reader for reader in readers if reader.target is SCALED_MM]
    if dtype in _FP8:
        return len(gemms) > 1
    return any(reader.target is aten.mm.default for reader in readers) and any(map(_is_cast, readers))


def _is_expanded(x: Tensor) -> bool:
    """Whether `x` repeats fewer values, as the gradient of a sum does: these are read faster than a tensor of all of them."""
    return any(isinstance(stride, int) and stride == 0 for stride in x.stride())


def run(graph: fx.Graph) -> None:
    """Marks what is to be stored, in place."""
    for node in graph.nodes:
        found = node.meta.get("val")
        if node.op != "call_function" or node.target in _VIEWS or not isinstance(found, Tensor):
            continue
        if _is_shared(node, found.dtype) and not _is_expanded(found):
            node.meta[REALIZE] = True
