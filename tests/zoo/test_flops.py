"""What counts as a matmul of weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.zoo.flops import Flops


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.experts = nn.Linear(8, 16), nn.Parameter(torch.randn(3, 16, 8))
        self.left, self.table = nn.Parameter(torch.randn(4, 8)), nn.Embedding(5, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)  # a bias, and a view of three dimensions
        h = h @ self.experts[1]  # a part of a weight
        computed = F.layer_norm(self.table.weight, (8,)) @ self.left.T  # weights alone
        outer = self.left[:, :1] @ x[:, :, 0].flatten()[None]
        return (
            self.left @ h.mT,
            F.scaled_dot_product_attention(x, h, h),
            h @ h.mT,
            x @ (2 * self.experts[0].T),
            computed,
            outer,
        )


def test_every_matmul_is_counted_and_those_of_weights_told_apart() -> None:
    model = Model()
    flops, rows = Flops(model), 2 * 6
    with sdpa_kernel(SDPBackend.MATH), flops:
        model(torch.randn(2, 6, 8))
    linears = 2 * (rows * 8 * 16 + rows * 16 * 8 + rows * 8 * 4 + rows * 8 * 16 + 5 * 8 * 4)
    activations, outer = 2 * rows * 6 * 8, 2 * 4 * rows
    assert flops.of_weights == linears
    assert flops.total == linears + 3 * activations + outer
