"""How operands and results are seen: views around `input (*, K) @ weight (K, N)`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fp8fx.graph.values import traced_size

__all__ = ["NONE", "POINTWISE", "View", "Views", "apply", "laid_out", "permute", "weight_on_the_left"]

View = tuple[Any, ...]
"""A Tensor method and its arguments, such as ("permute", 1, 0)."""


@dataclass(frozen=True)
class Views:
    """How a contraction becomes a matmul: views of the input, of the weight and of the result, in order."""

    input: tuple[View, ...] = ()
    weight: tuple[View, ...] = ()
    output: tuple[View, ...] = ()


NONE = Views()


def apply(x: Tensor, views: Sequence[View]) -> Tensor:
    """`x` seen so.

    >>> import torch
    >>> apply(torch.zeros(2, 3, 4), [("flatten", 0, 1), ("t",)]).shape
    torch.Size([4, 6])
    """
    for name, *arguments in views:
        x = getattr(x, name)(*arguments)
    return x


def permute(order: Sequence[int]) -> tuple[View, ...]:
    """The view with its dimensions in this order; none if they are in it already."""
    return () if list(order) == list(range(len(order))) else (("permute", *order),)


def _order_in_memory(x: Tensor) -> list[int]:
    """Its dimensions of more than size 1, from the outermost to the innermost."""
    strides = [traced_size(stride) or 0 for stride in x.stride()]
    dims = (dim for dim in range(x.dim()) if traced_size(x.shape[dim]) != 1)
    return sorted(dims, key=lambda dim: -strides[dim])


def laid_out(views: Views, made: Tensor, like: Tensor) -> Views:
    """The views, with a copy at the end if the result lies otherwise in memory than torch's own.

    A later view of the result may ask for that.

    Args:
        views: those around the matmul.
        made: the value of their result.
        like: the value of torch's own result, of the same shape.
    """
    if _order_in_memory(made) == _order_in_memory(like):
        return views
    # The dimensions of size 1 as well: torch chooses kernels by them.
    order = sorted(range(like.dim()), key=lambda dim: -(traced_size(like.stride()[dim]) or 0))
    back = [order.index(dim) for dim in range(made.dim())]
    return replace(views, output=(*views.output, *permute(order), ("contiguous",), *permute(back)))


def weight_on_the_left(input_dims: int) -> Views:
    """`weight (N, K) @ input`: of an input (K,), or (*, K, M)."""
    turned: tuple[View, ...] = (("transpose", -1, -2),) if input_dims > 1 else ()
    return Views(turned, (("t",),), turned)


POINTWISE = Views((("movedim", 1, -1),), (("flatten", 1), ("t",)), (("movedim", -1, 1),))
"""A convolution of size 1, input (*, K, ...) and weight (N, K, 1, ...): a linear of each pixel's channels."""
