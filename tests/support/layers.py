"""Models of equal layers, which are compiled once: tests/test_layers.py holds a CPU to what they compute,
tests/gpu/test_layers_cuda.py FP8 tensor cores."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fp8fx
from tests.support.numbers import error

FLIPS = 0.1
"""An ulp of one layer may push values of the next one's input over to the next FP8 value. What is wrong is off by 1."""

FEATURES = 64


class Layer(nn.Module):
    """A decoder's layer: four linears and causal attention."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(FEATURES)
        self.qkv = nn.Linear(FEATURES, 3 * FEATURES)
        self.out = nn.Linear(FEATURES, FEATURES, bias=False)
        self.norm_2 = nn.LayerNorm(FEATURES)
        self.up = nn.Linear(FEATURES, 2 * FEATURES)
        self.down = nn.Linear(2 * FEATURES, FEATURES)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm_1(x)).unflatten(-1, (3, 2, FEATURES // 2)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.dropout(self.out(y.transpose(1, 2).flatten(2)), self.dropout, self.training)
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class Decoder(nn.Module):
    """Layers between an embedding of features and a head."""

    def __init__(self, layers: int = 3, **given: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(32, FEATURES)
        self.layers = nn.ModuleList(Layer(**given) for _ in range(layers))
        self.norm = nn.LayerNorm(FEATURES)
        self.head = nn.Linear(FEATURES, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def steps(call: Callable[[Tensor], Tensor], model: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    """What training gives: each output, the gradients of each step, and the parameters at the end."""
    given = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in inputs:
        out = call(x)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        out.square().mean().backward()
        # What backward may overwrite is none of these.
        for parameter, old in zip(model.parameters(), before, strict=True):
            assert torch.equal(parameter, old)
        given += [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
        optimizer.zero_grad()
    return [*given, *(parameter.detach() for parameter in model.parameters())]


def compiled(model: nn.Module, **options: Any) -> tuple[Callable[[Tensor], Tensor], fp8fx.Backend]:
    backend = fp8fx.Backend(fp8fx.Config(profit="always", **options))
    return torch.compile(model, backend=backend, fullgraph=True), backend


def assert_trains(model: nn.Module, inputs: Sequence[Tensor], most: float = FLIPS, **options: Any) -> None:
    """That training with layers that are compiled once gives what the FP8 ops give eagerly."""
    eager = copy.deepcopy(model)
    expected = steps(fp8fx.convert(eager, profit="always", **options), eager, inputs)
    call, _ = compiled(model, **options)
    for value, reference in zip(steps(call, model, inputs), expected, strict=True):
        assert error(value, reference) < most
