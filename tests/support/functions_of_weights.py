"""Weights, and a function of them as a forward: what the tests of freeze convert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fp8fx.recipes.recipe import RECIPES

recipes = pytest.mark.parametrize("recipe", RECIPES)


class Model(nn.Module):
    """Some weights and a function of them as its forward."""

    def __init__(self, function: Callable[[Model, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.fc = nn.Linear(8, 12)
        self.w = nn.Parameter(torch.randn(12, 8))
        self.kn = nn.Parameter(torch.randn(8, 12))
        self.b = nn.Parameter(torch.randn(12))
        self.register_buffer("buffer", torch.randn(12, 8))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class Written(nn.Module):
    """A weight (16, 16), a linear, a buffer (3, 16, 16), and a function of them and of two inputs (3, 16, 16) as its
    forward."""

    def __init__(self, function: Callable[[Written, Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.w = nn.Parameter(torch.randn(16, 16, dtype=torch.bfloat16))
        self.fc = nn.Linear(16, 16, dtype=torch.bfloat16)
        self.register_buffer("kv", torch.randn(3, 16, 16, dtype=torch.bfloat16))
        self.register_buffer("ids", torch.tensor([2, 5]))
        self.register_buffer("part", self.w.detach()[8:])
        self.act, self.embed = nn.ReLU(inplace=True), nn.Embedding(16, 16, max_norm=0.5)
        self.embed.weight = self.w
        self.requires_grad_(False)

    def forward(self, x: Tensor, k: Tensor) -> Any:
        return self.function(self, x, k)
