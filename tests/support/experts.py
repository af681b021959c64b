"""Models of experts, and operands of a grouped matmul."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fp8fx
from fp8fx.config import Config
from fp8fx.recipes.recipe import RECIPES
from tests.support.capture import Capture

recipes = pytest.mark.parametrize("recipe", list(RECIPES))

OFFS = torch.tensor([5, 5, 20, 34], dtype=torch.int32)  # the second expert gets nothing, three rows are nobody's
ROWS, K, N = 37, 64, 48


def operands(requires_grad: bool = False) -> tuple[Tensor, Tensor]:
    a, w = (
        torch.randn(*shape, dtype=torch.bfloat16).requires_grad_(requires_grad)
        for shape in ((ROWS, K), (len(OFFS), N, K))
    )
    return a, w


class Experts(nn.Module):
    def __init__(self, k: int = K, n: int = N) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(len(OFFS), n, k, dtype=torch.bfloat16))

    def forward(self, x: Tensor, offs: Tensor) -> Tensor:
        return F.grouped_mm(x, self.weight.transpose(-2, -1), offs=offs)


def rewritten(model: nn.Module, *inputs: Any, **options: Any) -> tuple[fx.GraphModule, fp8fx.Report]:
    capture = Capture(Config(**options))
    torch.compile(model, backend=capture)(*inputs)
    return capture.only.after, capture.only.report


class Batched(Experts):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.transpose(-2, -1)
