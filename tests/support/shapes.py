"""Models and inputs whose shapes vary, and that they compute what is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

import fp8fx
from fp8fx.convert import rewritten
from fp8fx.ops.matmul import op


class Siblings(nn.Module):
    """A linear for each recipe."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, width, bias=False), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) * self.k(x) + self.v(x)


def every_recipe(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """The backend, after two rewrites: q is mixed, k is global and v is rowwise."""
    for recipe, path in (("mixed", "q"), ("global", "k")):
        gm, report = rewritten(gm, inputs, fp8fx.Config(recipe=recipe, include=path, profit="always"))
        assert [row.path for row in report.rewritten] == [path]
    backend = fp8fx.Backend(fp8fx.Config(recipe="rowwise", profit="always"))
    call = backend(gm, inputs)
    assert [row.path for row in backend.reports[0].rewritten] == ["v"]
    return call


def compiled_at(backend: Callable[..., Any], train: bool, dynamic: bool | None, device: str = "cpu") -> list[int]:
    """The lengths whose call compiled something, as often as it did."""
    torch._dynamo.reset()
    found: list[int] = []
    length = -1

    def counting(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        found.append(length)
        return backend(gm, inputs)

    compiled = torch.compile(Siblings().to(device), backend=counting, dynamic=dynamic, fullgraph=True)
    with torch.set_grad_enabled(train):
        for length in (16, 17, 18, 33, 200, 1, 0):
            x = torch.randn(2, length, 64, device=device, requires_grad=train)
            out = compiled(x)
            assert out.shape == x.shape and out.isfinite().all()
            if train:
                (grad,) = torch.autograd.grad(out.sum(), x)
                assert grad.shape == x.shape and grad.isfinite().all()
    return found


def linear(layer: nn.Linear, x: Tensor, recipe: str) -> Tensor:
    out: Tensor = op(recipe)(x, layer.weight.t(), bias=layer.bias)
    return out


class Narrow(nn.Module):
    """Linears of features that are fewer than 16 or no multiple of it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(17, 3), nn.Linear(3, 1), nn.Linear(1, 40)

    def forward(self, x: Tensor) -> Tensor:
        return self.v(self.k(self.q(x).tanh()).tanh())


def siblings(model: Any, x: Tensor) -> Tensor:
    return linear(model.q, x, "mixed") * linear(model.k, x, "global") + linear(model.v, x, "rowwise")


def narrow(model: Any, x: Tensor) -> Tensor:
    return linear(model.v, linear(model.k, linear(model.q, x, "mixed").tanh(), "global").tanh(), "rowwise")


def assert_as_written(model: nn.Module, by_hand: Callable[[Any, Tensor], Tensor], *shapes: tuple[int, ...]) -> None:
    """The output, the input's gradient and every parameter's.

    Another order of sums may push a value over to the next FP8 value.
    """
    compiled, device = torch.compile(model, backend=every_recipe, fullgraph=True), next(model.parameters()).device
    for shape in shapes:
        x, results = torch.randn(shape, device=device, requires_grad=True), []
        for call in (compiled, lambda x: by_hand(model, x)):
            out = call(x)
            results.append([out, *torch.autograd.grad(out, (x, *model.parameters()), torch.ones_like(out))])
        for value, reference in zip(*results, strict=True):
            assert (value.shape, value.dtype) == (reference.shape, reference.dtype)
            assert (value - reference).norm() <= 1e-2 * reference.norm()
