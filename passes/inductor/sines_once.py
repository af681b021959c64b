"""sines_once: a table of sines or cosines that larger tensors read is written to memory once, on Inductor's graph.

    c = cast(mul(cos(f), s)); mul(q, expand(c)); mul(k, expand(c))    ->  c is marked: Inductor writes it

Inductor inlines the table into every kernel that reads it, and computes the cosine anew for each element of q and k:
rotary embeddings take several times as long as their memory traffic then, in every layer. The table itself is small.
It is rounded to its dtype as eager rounds it, where an inlined one keeps more digits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from fp8fx.graph.operators import views_first
from fp8fx.graph.values import traced_size
from fp8fx.torch_internals import REALIZE

__all__ = ["run"]

aten = torch.ops.aten

_SINES = (aten.cos.default, aten.sin.default)


def _elements(node: fx.Node) -> int:
    value = node.meta.get("val")
    return (traced_size(value.numel()) or 0) if isinstance(value, Tensor) else 0


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """What reads a node, as it is or through views of any kind."""
    for user in node.users:
        if views_first(user):
            yield from _readers(user)
        else:
            yield user


def _is_pointwise(node: fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def _end_of_table(sine: fx.Node) -> fx.Node:
    """The last of what is computed of the sines alone: scaled and cast, but not combined with another tensor."""
    end = sine
    while len(end.users) == 1:
        (user,) = end.users
        if not _is_pointwise(user) or user.all_input_nodes != [end]:
            break
        end = user
    return end


def run(graph: fx.Graph) -> None:
    """Marks the tables, in place."""
    for target in _SINES:
        for sine in graph.find_nodes(op="call_function", target=target):
            table = _end_of_table(sine)
            size = _elements(table)
            if any(_is_pointwise(reader) and _elements(reader) > size for reader in _readers(table)):
                table.meta[REALIZE] = True
