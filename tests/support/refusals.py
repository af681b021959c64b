"""Reasons of refusals, a model of any function, and the one refusal of its report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

ACTIVATIONS = "activation times activation"
COMPUTED = "the weight is computed, not a parameter, a buffer, a constant or a view of one"


class Scaled(nn.Linear):
    """A linear that does something else as well."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Model(nn.Module):
    """Square weights, so that any of them can stand anywhere, and a function of them as its forward."""

    def __init__(self, function: Callable[[Model, Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.fc = nn.Linear(8, 8)
        self.scaled = Scaled(8, 8)
        self.w = nn.Parameter(torch.randn(8, 8))
        self.b = nn.Parameter(torch.randn(8))
        self.experts = nn.Parameter(torch.randn(4, 8, 8))
        self.register_buffer("index", torch.tensor([7, 6, 5, 4, 3, 2, 1, 0]))
        self.register_buffer("number", torch.tensor(3))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def only_refusal(new: fx.GraphModule, old: fx.GraphModule) -> Any:
    """The one row of the report, of a graph that has not changed."""
    assert new.code == old.code
    assert [n.format_node() for n in new.graph.nodes] == [n.format_node() for n in old.graph.nodes]
    (row,) = new.meta["fp8fx_report"].rows
    assert (row.op, row.executor, row.bsz, row.bsz2) == (None, None, None, None)
    return row
