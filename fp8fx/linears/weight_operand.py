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
    """Whether the node is a view of its one input, or a copy of it that changes no value.

    A node of several inputs is gathered or sliced by what another node computes.
    """
    return len(node.all_input_nodes) == 1 and is_called_view(node)


def is_called_view(node: fx.Node) -> bool:
    """Whether what the node calls gives a view of its first argument, or a copy of it that changes no value."""
    if not isinstance(first_argument(node), fx.Node) or called(node) in _CASTS | _OF_MEMORY:
        return False
    return views_first(node) or copies_first(node)


def first_argument(node: fx.Node) -> Any:
    """What a call is given first, by position or as `input` or `self`."""
    return node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))


_OF_MEMORY = {"as_strided"}
"""Which values they see depends on how the weight lies in memory."""


_CASTS = {"to", "type", "type_as", "half", "bfloat16", "_to_copy", "convert_element_type"}


def is_cast(node: fx.Node) -> bool:
    """Whether the node casts its first argument down to a 16-bit dtype: what is multiplied is no more exact.

    A cast to float32 is meant. Integers times a scale are a quantization of their own.
    """
    if called(node) not in _CASTS:
        return False
    source = first_argument(node)
    after = fake(node)
    before = fake(source) if isinstance(source, fx.Node) else None
    if after is None or before is None:
        return False
    if not before.dtype.is_floating_point or before.dtype.itemsize < 2:
        return False
    return after.dtype in (torch.float16, torch.bfloat16)


def is_gather(node: fx.Node) -> bool:
    """Whether the node takes rows or columns of its first argument by an index tensor, otherwise than by getitem."""
    return called(node) in ("index", "index_select")


def weight_behind(node: fx.Node, constants: Set[fx.Node]) -> fx.Node | None:
    """The node of `constants` that `node` is a view, a part or a cast to fewer bits of; None if there is none."""
    while node not in constants:
        source = first_argument(node)
        if not (is_called_view(node) or is_cast(node) or is_gather(node)) or not isinstance(source, fx.Node):
            return None
        node = source
    return node
