"""sigmoid_of_gelu: GELU's tanh is computed as a sigmoid, on Inductor's graph.

    add(tanh(u), 1)    ->    mul(sigmoid(mul(u, 2)), 2)

An FP8 linear reads GELU's output twice, for amax and for the cast, and Inductor computes it twice. CUDA's tanh takes
longer than the memory then; a sigmoid does not. The two differ by a rounding of float32. A tanh that anything else
reads is left alone: near zero it has more digits than a sigmoid gives. So GELU's backward, which squares it, stays.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["run"]

aten = torch.ops.aten


def _adds_one(node: fx.Node) -> bool:
    return node.target is aten.add.Tensor and bool(node.args[1] == 1) and not node.kwargs


def _is_gelus(tanh: fx.Node) -> bool:
    value = tanh.meta.get("val")
    return isinstance(value, Tensor) and value.dtype == torch.float32 and all(map(_adds_one, tanh.users))


def _replace(tanh: fx.Node) -> None:
    graph = tanh.graph

    def new(target: Any, *args: Any) -> fx.Node:
        node = graph.call_function(target, args)
        node.meta = dict(tanh.meta)
        return node

    with graph.inserting_before(tanh):
        sigmoid = new(aten.sigmoid.default, new(aten.mul.Tensor, tanh.args[0], 2))
        doubled = new(aten.mul.Tensor, sigmoid, 2)
    for user in list(tanh.users):
        user.replace_all_uses_with(doubled)
        graph.erase_node(user)
    graph.erase_node(tanh)


def run(graph: fx.Graph) -> None:
    """Replaces every tanh of a GELU, in place."""
    for tanh in graph.find_nodes(op="call_function", target=aten.tanh.default):
        if _is_gelus(tanh):
            _replace(tanh)
