"""Models whose weights are frozen, and how they are compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from tests.support.freezing import saved


class Tied(nn.Module):
    """A head tied to the embedding, and one linear used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.twice = nn.Embedding(48, 64), nn.Linear(64, 64)
        self.head = nn.Linear(64, 48, bias=False)
        self.head.weight = self.embed.weight
        self.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.relu(self.twice(self.twice(self.embed(tokens)))))


def compiled(model: nn.Module, recipe: str = "global", **options: Any) -> Any:
    return torch.compile(model, backend="fp8", options={"recipe": recipe, "freeze": True, **options})


COPIES: dict[str, Callable[[fx.GraphModule], fx.GraphModule]] = {
    "itself": lambda gm: gm,
    "deepcopy": copy.deepcopy,
    "torch.save": saved,
    "copies of copies": lambda gm: saved(copy.deepcopy(saved(copy.deepcopy(gm)))),
    "copy": copy.copy,  # shares the tensors, as of every module
}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc(x))


class Breaking(nn.Module):
    """A graph for each layer."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(count))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            torch._dynamo.graph_break()
        return x
