"""Which parameters a call of a model reads as the weights of linears, whatever module holds them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fp8fx.capture import run_captured
from fp8fx.config import Config
from fp8fx.graph.copies import copy
from fp8fx.linears.matches import GroupedMatch, LinearMatch
from fp8fx.linears.routers import is_router
from fp8fx.passes.rewrite import check, expand, match
from fp8fx.pipeline import Rewrite, run
from fp8fx.weights.linear_weights import Slot
from fp8fx.weights.weight_read import WeightRead

__all__ = ["Use", "used_weights"]


@dataclass
class Use:
    """How the linears of a call read a parameter.

    Attributes:
        spelling: how the first of them is written.
        transposed: whether it contracts the last dimension but one.
        routes: whether topk chooses by one of them.
    """

    spelling: str
    transposed: bool
    routes: bool


def _contracted(read: WeightRead) -> int | None:
    """Which dimension of the parameter the linear contracts, -1 or -2; None if another, or if that cannot be told."""
    whole = torch.empty(read.source.shape, device="meta")
    try:
        operand = read.part(whole) if isinstance(read.match, GroupedMatch) else read.operand(whole)
    except RuntimeError:
        return None
    stride = operand.stride(-2)
    return next((dim for dim in (-1, -2) if whole.dim() >= 2 and whole.stride(dim) == stride), None)


def used_weights(
    model: nn.Module, called: Callable[..., Any], inputs: Sequence[Any], config: Config
) -> tuple[list[Slot], set[int]]:
    """The parameters of `model` that the linears of a call read, and the ids of those that choose experts.

    It runs `called` once, which is the model without what has compiled it.
    """
    uses: dict[int, Use] = {}

    def collect(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        rewrite = Rewrite(copy(gm), config, example_inputs)
        run(rewrite, (expand, match, check))
        for linear in rewrite.matches:
            _add(linear, rewrite, uses)

    run_captured(called, collect, *inputs)
    slots = []
    for path, module in model.named_modules():
        for attribute, x in module._parameters.items():
            if x is not None and id(x) in uses:
                use = uses[id(x)]
                slots.append(Slot(path, module, attribute, use.spelling, use.transposed))
    return slots, {key for key, use in uses.items() if use.routes}


def _add(linear: LinearMatch, rewrite: Rewrite, uses: dict[int, Use]) -> None:
    read = WeightRead.of(linear, rewrite.facts)
    if read is None or not isinstance(read.source, nn.Parameter) or read.source.dim() not in (2, 3):
        return
    dim = _contracted(read)
    if dim is None:
        return
    use = uses.setdefault(id(read.source), Use(linear.spelling, dim == -2, routes=False))
    use.routes = use.routes or is_router(linear)
