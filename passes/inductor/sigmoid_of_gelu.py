"""sigmoid_of_gelu: GELU's tanh is computed as a sigmoid, on Inductor's graph.

    add(tanh(u), 1)                  ->    mul(sigmoid(mul(u, 2)), 2)
    t = tanh(u); mul(t, t)           ->    t = sub(mul(s, 2), 1), of the same sigmoid s: GELU's backward

An FP8 linear reads GELU's output twice, for amax and for the cast, and Inductor computes it twice. CUDA's tanh takes
longer than the memory then; a sigmoid does not. The two differ by a rounding of float32. A tanh that is read in any
other way is left alone: near zero it has more digits than a sigmoid gives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["run"]

aten = torch.ops.aten


def _adds_one(node: fx.Node) -> bool:
    return node.target is aten.add.Tensor and bool(node.args[1] == 1) and not node.kwargs


def _squares(node: fx.Node) -> bool:
    return node.target is aten.mul.Tensor and node.args[0] is node.args[1]


def _is_gelus(tanh: fx.Node) -> bool:
    value = tanh.meta.get("val")
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        return False
    return any(map(_adds_one, tanh.users)) and all(_adds_one(user) or _squares(user) for user in tanh.users)


def _replace(tanh: fx.Node) -> None:
    graph = tanh.graph

    def new(target: Any, *args: Any) -> fx.Node:
        node = graph.call_function(target, args)
        node.meta = dict(tanh.meta)
        return node

    with graph.inserting_before(tanh):
        sigmoid = new(aten.sigmoid.default, new(aten.mul.Tensor, tanh.args[0], 2))
        doubled = new(aten.mul.Tensor, sigmoid, 2)
        same = new(aten.sub.Tensor, doubled, 1)
    for user in [user for user in tanh.users if _adds_one(user)]:
        user.replace_all_uses_with(doubled)
        graph.erase_node(user)
    tanh.replace_all_uses_with(same)
    graph.erase_node(tanh)
    if not same.users:
        graph.erase_node(same)


def run(graph: fx.Graph) -> None:
    """Replaces every tanh of a GELU, in place."""
    for tanh in graph.find_nodes(op="call_function", target=aten.tanh.default):
        if _is_gelus(tanh):
            _replace(tanh)
