"""How operands and results are seen: views around `input (*, K) @ weight (K, N)`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fp8fx.graph.values import traced_size

__all__ = ["NONE", "POINTWISE", "View", "Views", "apply", "laid_out", "permute", "weight_on_the_left"]

View = tuple[Any, ...]
"""A Tensor method and its arguments, as ("permute", 1, 0)."""


@dataclass(frozen=True)
class Views:
    """How a contraction becomes a matmul: views of the input, of the weight and of the result, in order."""

    input: tuple[View, ...] = ()
    weight: tuple[View, ...] = ()
    output: tuple[View, ...] = ()


NONE = Views()


def apply(x: Tensor, views: Sequence[View]) -> Tensor:
    """`x` seen so."""
    for name, *arguments in views:
        x = getattr(x, name)(*arguments)
    return x


def permute(order: Sequence[int]) -> tuple[View, ...]:
    return () if list(order) == list(range(len(order))) else (("permute", *order),)


def laid_out(views: Views, made: Tensor, like: Tensor) -> Views:
    """With a copy at the end where `made`, the views' result, lies otherwise in memory than `like`, torch's own: a later view of it may
    ask for that."""

    def order(x: Tensor) -> list[int]:
        strides = [traced_size(stride) or 0 for stride in x.stride()]
        return sorted((d for d in range(x.dim()) if traced_size(x.shape[d]) != 1), key=lambda d: -strides[d])

    wanted = order(like)
    if order(made) == wanted:
        return views
    full = sorted(
        range(like.dim()), key=lambda d: -(traced_size(like.stride()[d]) or 0)
    )  # the ones of size 1 too, by which torch chooses kernels
    copied = (*permute(full), ("contiguous",), *permute([full.index(d) for d in range(made.dim())]))
    return replace(views, output=views.output + copied)


def weight_on_the_left(input_dims: int) -> Views:
    """`weight (N, K) @ input`: of (K,), or of (*, K, M)."""
    turned: tuple[View, ...] = (("transpose", -1, -2),) if input_dims > 1 else ()
    return Views(turned, (("t",),), turned)


POINTWISE = Views((("movedim", 1, -1),), (("flatten", 1), ("t",)), (("movedim", -1, 1),))
"""A convolution of size 1, input (*, K, ...) and weight (N, K, 1, ...): a linear of each pixel's channels."""
