"""What the ops share of autograd: gradients without a derivative of their own, and the transforms that they refuse."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from fp8fx.errors import DifferentiationError
from fp8fx.torch_internals import is_gradtrackingtensor

__all__ = ["check_transforms", "refuse_forward_mode", "refuse_second_derivative"]


class _NotDifferentiable(torch.autograd.Function):
    """A gradient that is computed but cannot be differentiated: rounding has no useful derivative."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, name: str, *dependencies: Tensor) -> Tensor:
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise DifferentiationError(
            f"a gradient of {ctx.name} was differentiated again; its quantization has no second derivative. "
            "Leave the linears behind such a loss in high precision: exclude them by their module paths"
        )


def refuse_second_derivative(
    gradients: tuple[Tensor | None, ...], name: str, *dependencies: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of the op of that name. To differentiate them by a dependency raises DifferentiationError."""
    floats = [x for x in dependencies if x is not None and x.is_floating_point()]
    return tuple(
        gradient if gradient is None else _NotDifferentiable.apply(gradient, name, *floats)  # type: ignore[no-untyped-call]
        for gradient in gradients
    )


def refuse_forward_mode(name: str) -> NoReturn:
    """Raises DifferentiationError: the op of that name was differentiated in forward mode."""
    raise DifferentiationError(
        f"{name} was differentiated in forward mode (torch.autograd.forward_ad, torch.func.linearize), "
        'for which it has no rule; use backward, or torch.compile(..., backend="fp8") around it all, '
        "which leaves such linears in high precision"
    )


def check_transforms(name: str, *operands: Tensor) -> None:
    """Raises DifferentiationError if torch.func differentiates an operand: the op's gradient is autograd's."""
    if any(map(is_gradtrackingtensor, operands)):
        raise DifferentiationError(
            f"{name} was called inside grad, jvp or another transform of torch.func, which cannot see its gradient; "
            'use torch.autograd, or torch.compile(..., backend="fp8") around the transform, '
            "which leaves such linears in high precision"
        )
