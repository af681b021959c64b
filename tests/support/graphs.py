"""A small model, and a look at its graph's nodes."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn


class Model(nn.Module):
    """A parameter, a buffer, a constant and a submodule, two levels deep."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.fc = nn.Linear(4, 4)
        self.inner.register_buffer("bias", torch.ones(4), persistent=False)
        self.w = nn.Parameter(torch.randn(4, 4))
        self.constant = torch.randn(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner.fc(x) @ self.w.t() + self.inner.bias + self.constant


def node(gm: fx.GraphModule, name: str) -> fx.Node:
    return next(n for n in gm.graph.nodes if n.name == name)
