"""store_once: what several GEMMs read is written to memory once, on Inductor's final graph.

    x8 = cast(x); scaled_mm(x8, v); scaled_mm(x8, w)    ->  x8 is marked: Inductor writes it before anything reads it
    g = f(...); mm(t(g), a); scaled_mm(cast(g), w8)     ->  g is marked

Inductor inlines a pointwise operand into each `_scaled_mm` and writes it once for each; it does not do so for `mm`. If
it has not written a tensor yet when it meets a cast of it, it computes the tensor again for the cast: such as a
gradient that wgrad reads in high precision and dgrad in FP8.

A mark asks for strides only if they are numbers. The strides of an expanded gradient are no layout to write in: it is
not marked.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fp8fx.recipes.pattern import FP8_DTYPES, begins_cast, is_view, readers
from fp8fx.torch_internals import REALIZE, SCALED_MM

__all__ = ["run"]

aten = torch.ops.aten


def _is_shared(node: fx.Node, dtype: torch.dtype) -> bool:
    """Whether several GEMMs read `node`: as FP8, or one in high precision and one by a cast."""
    reading = set(readers(node))
    if dtype in FP8_DTYPES:
        return sum(reader.target is SCALED_MM for reader in reading) > 1
    return any(reader.target is aten.mm.default for reader in reading) and any(map(begins_cast, reading))


def _is_expanded(x: Tensor) -> bool:
    """Whether `x` repeats fewer values, as the gradient of a sum does. They are read faster than all of them are."""
    return any(isinstance(stride, int) and stride == 0 for stride in x.stride())


def run(graph: fx.Graph) -> None:
    """Marks what is to be stored, in place."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op != "call_function" or is_view(node) or not isinstance(value, Tensor):
            continue
        if _is_shared(node, value.dtype) and not _is_expanded(value):
            node.meta[REALIZE] = True
