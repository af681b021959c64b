"""Numbers that FP8 finds hard, and what every device makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import fp8fx
from fp8fx.ops.matmul import op


def error(value: Tensor, reference: Tensor) -> float:
    value, reference = value.detach().double(), reference.detach().double()
    return float((value - reference).norm() / reference.norm())


Train = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]
"""Of a, weight and gradient: the output and both gradients."""


def by_op(recipe: str) -> Train:
    def train(a: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().clone().requires_grad_() for x in (a, weight)]
        out = op(recipe)(leaves[0], leaves[1].t())
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    return train


def by_backend(recipe: str) -> Train:
    """Through Inductor; compiles once, for operands of one dtype and of one shape."""
    layer = nn.Linear(1, 1, bias=False)
    call = torch.compile(layer, backend="fp8", fullgraph=True, options={"recipe": recipe, "profit": "always"})

    def train(a: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        layer.weight, a = nn.Parameter(weight), a.detach().requires_grad_()
        out = call(a)
        return out.detach(), *torch.autograd.grad(out, (a, layer.weight), grad)

    return train


HOW: dict[str, Callable[[str], Train]] = {"eager": by_op, "compiled": by_backend}


def exactly(a: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """The same of a linear in float64."""
    a, weight, grad = a.double(), weight.double(), grad.double()
    return a @ weight.t(), grad @ weight, grad.t() @ a


SPOILED = {1: math.nan, 3: math.inf, 4: -math.inf, 6: 6e4, 9: 0.0}  # the value of a whole row


def compiled(model: nn.Module) -> Callable[[Tensor], Tensor]:
    call: Callable[[Tensor], Tensor] = torch.compile(model, backend="fp8", fullgraph=True, options={"profit": "always"})
    return call


CALLS: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "mixed, compiled": compiled,
    "mixed": lambda model: fp8fx.convert(model, profit="always"),
    "mixed, frozen": lambda model: fp8fx.convert(model.requires_grad_(False), profit="always", freeze=True),
    "rowwise": lambda model: fp8fx.convert(model, profit="always", recipe="rowwise"),
}


def assert_no_row_harms_another(how: str, rows: int, device: str) -> None:
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)).to(device, torch.float16)
    a, grad = (torch.randn(rows, 64).to(device, torch.float16) for _ in range(2))
    call, spoiled, others, results = CALLS[how](model), a.clone(), [i for i in range(rows) if i not in SPOILED], []
    for row, value in SPOILED.items():
        spoiled[row] = value
    for x in (a, spoiled):
        x.requires_grad_()
        out = call(x)
        results.append((out.detach(), torch.autograd.grad(out, x, grad)[0]))
    for clean, value in zip(*results, strict=True):
        assert torch.equal(value[others], clean[others])
    out = results[1][0]
    assert not out[[1, 3, 4]].isfinite().any()  # nothing is swallowed
    assert error(out[9], model(torch.zeros_like(a[0]))) < 0.07


# a, weight and gradient; their powers of two are those next to 1e-20 and 1e30.
SCALES = [(-66, 0, 0), (99, 0, 0), (0, -66, 0), (0, 99, 0), (0, 0, -66), (0, 0, 99), (-66, 99, 0), (99, -66, 20)]


def assert_every_bit(exponents: Sequence[int], dtype: torch.dtype, train: Train, device: str) -> None:
    """A power of two in an operand is the same power of two in the results."""
    operands = [torch.randn(shape).to(device, dtype) for shape in ((7, 100), (50, 100), (7, 50))]
    a, weight, grad = exponents
    scaled = [x * 2.0**e for x, e in zip(operands, exponents, strict=True)]
    powers = a + weight, grad + weight, grad + a
    for value, plain, power in zip(train(*scaled), train(*operands), powers, strict=True):
        assert torch.equal(value, plain * 2.0**power)
        assert value.isfinite().all() and value.count_nonzero() > value.numel() / 2


SUBNORMAL = [
    (where, exponent) for where in range(3) for exponent in (-12, -18, -22)
]  # a, weight or gradient, times that power of two


def assert_subnormals_lose_no_more_than_other_numbers(where: int, exponent: int, train: Train, device: str) -> None:
    operands = [torch.randn(shape) * 2.0**10 for shape in ((7, 100), (50, 100), (7, 50))]
    operands[where] *= 2.0 ** (exponent - 10)
    operands = [x.to(device, torch.float16) for x in operands]
    results = list(zip(train(*operands), exactly(*operands), strict=True))
    for value, reference in (
        results[i] for i in {0: (0, 2), 1: (0, 1), 2: (1, 2)}[where]
    ):  # where the operand takes part
        assert error(value, reference) < 0.08


def assert_outliers_cost_no_precision(dtype: torch.dtype, train: Train, device: str) -> None:
    a, weight, grad = torch.randn(64, 256), torch.randn(128, 256) / 16, torch.randn(64, 128)
    a[:, 7] *= 1000
    weight[:, 7] = 0  # so that the others are all there is to see
    operands = [x.to(device, dtype) for x in (a, weight, grad)]
    results = list(zip(train(*operands), exactly(*operands), strict=True))
    for value, reference in results:
        assert error(value, reference) < 0.07
    others = [i for i in range(256) if i != 7]
    assert error(*(x[:, others] for x in results[2])) < 0.07


def assert_zero_weights_give_the_bias(recipe: str, freeze: bool, compiled: bool, device: str) -> None:
    layer, x, grad = (
        nn.Linear(100, 50).to(device),
        torch.randn(7, 100).to(device).requires_grad_(),
        torch.randn(7, 50).to(device),
    )
    nn.init.zeros_(layer.weight)
    layer.requires_grad_(not freeze)
    options = {"recipe": recipe, "freeze": freeze, "profit": "always"}
    call = (
        torch.compile(layer, backend="fp8", fullgraph=True, options=options)
        if compiled
        else fp8fx.convert(layer, **options)
    )
    out = call(x)
    assert torch.equal(out, layer.bias.expand(7, 50))
    out.backward(grad)
    assert x.grad is not None and not x.grad.any()
    if not freeze:
        assert layer.weight.grad is not None and error(layer.weight.grad, grad.t() @ x) < 0.07  # from which it trains
