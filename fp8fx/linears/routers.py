"""Linears that choose experts."""

from __future__ import annotations

from torch import fx

from fp8fx.graph.operators import called
from fp8fx.graph.values import fake, traced_size
from fp8fx.linears.matches import LinearMatch, Refusal

__all__ = ["is_router"]


def is_router(linear: LinearMatch | Refusal) -> bool:
    """Whether the topk of what the linear gives is taken, with softmax and the like in between.

    An output over a vocabulary, which is wider than K, is no router's.
    """
    result = fake(linear.node)
    if not isinstance(linear.n, int) or not isinstance(linear.k, int) or linear.n >= linear.k or result is None:
        return False
    count = traced_size(result.numel())
    pending = [linear.node]
    reached: set[fx.Node] = {linear.node}
    while pending:
        for user in pending.pop().users:
            if called(user) == "topk":
                return True
            value = fake(user)
            if value is None or user in reached or count is None or traced_size(value.numel()) != count:
                continue
            reached.add(user)
            pending.append(user)
    return False
