"""What leaves a weight a weight: views, and copies that change no value."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
from torch import fx

from fp8fx.graph.operators import called, copies_first, views_first
from fp8fx.graph.values import fake

__all__ = ["first_argument", "is_called_view", "is_cast", "is_gather", "is_view", "weight_behind"]


def is_view(node: fx.Node) -> bool:
    """Whether the node is a view of its one input, or a copy of it that changes no value."""
    return len(node.all_input_nodes) == 1 and is_called_view(
        node
    )  # else gathered or sliced by what another node computes


def is_called_view(node: fx.Node) -> bool:
    """Whether what the node calls gives a view of its first argument, or a copy of it that changes no value."""
    seen = isinstance(first_argument(node), fx.Node) and called(node) not in _CASTS | _OF_MEMORY
    return seen and (views_first(node) or copies_first(node))


def first_argument(node: fx.Node) -> Any:
    """What a call is given first, by position or as `input` or `self`."""
    return node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))


_OF_MEMORY = {"as_strided"}  # which values it sees depends on how the weight lies


_CASTS = {"to", "type", "type_as", "half", "bfloat16", "_to_copy", "convert_element_type"}


def is_cast(node: fx.Node) -> bool:
    """Whether the node casts its first argument down to a 16-bit dtype: what is multiplied is no more exact.

    A cast to float32 is meant.
    """
    if called(node) not in _CASTS:
        return False
    known, source = fake(node), first_argument(node)
    before = fake(source) if isinstance(source, fx.Node) else None
    if known is None or before is None or not before.dtype.is_floating_point or before.dtype.itemsize < 2:
        return False  # integers times a scale are a quantization of their own
    return known.dtype in (torch.float16, torch.bfloat16)


def is_gather(node: fx.Node) -> bool:
    """Whether the node takes rows or columns of its first argument by an index tensor, otherwise than by getitem."""
    return called(node) in ("index", "index_select")


def weight_behind(node: fx.Node, constants: Set[fx.Node]) -> fx.Node | None:
    """The one of `constants` that `node` is a view of, or a part, or a cast to fewer bits."""
    while node not in constants:
        source = first_argument(node)
        if not (is_called_view(node) or is_cast(node) or is_gather(node)) or not isinstance(source, fx.Node):
            return None
        node = source
    return node
