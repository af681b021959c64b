"""A small model with a linear of each kind, and the same by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

mixed = torch.ops.fp8fx.matmul_fp8_mixed.default


class MLP(nn.Module):
    """A linear called as a module, one written out, a buffer that is saved and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(16, 32)
        self.w = nn.Parameter(torch.randn(32, 16) / 4)
        self.register_buffer("scale", torch.rand(16))
        self.register_buffer("shift", torch.rand(16), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.fc(x)) @ self.w * self.scale + self.shift

    def by_hand(self, x: Tensor) -> Tensor:
        h = mixed(x, self.fc.weight.t(), 64, 64, bias=self.fc.bias)
        return mixed(F.gelu(h), self.w, 64, 64) * self.scale + self.shift


def example() -> Tensor:
    return torch.randn(4, 16)
