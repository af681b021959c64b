"""The three ways in: compile a model, convert its graph, or explain what would be rewritten and what not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fp8fx


class Mixer(nn.Module):
    """Three ways to write a linear, and a matmul of two activations, which is none."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Parameter(torch.randn(width, 4 * width) / (4 * width) ** 0.5)
        self.out = nn.Parameter(torch.randn(width, width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.gelu(self.up(x)) @ self.down.T
        h = torch.softmax(h @ x.T, dim=-1) @ h
        return torch.addmm(x, h, self.out)


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    model, x = Mixer(256).eval(), torch.randn(64, 256)
    outputs = {
        "compile": torch.compile(model, backend="fp8", options={"recipe": "global"})(x),
        "convert": fp8fx.convert(torch.fx.symbolic_trace(model), recipe="mixed")(x),
    }
    print(fp8fx.explain(model, x))
    for name, output in outputs.items():
        print(f"{name}: relative error {(output - model(x)).norm() / model(x).norm():.4f}")


if __name__ == "__main__":
    main()
