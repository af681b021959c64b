"""Which operand of which GEMM is quantized, and how: recipes, as data.

A recipe is its lines here: its option, its operators and its module follow from `RECIPES`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from fp8fx.errors import ConfigError
from fp8fx.recipes.formats import E4M3, E4M3_FULL, E5M2, Format

__all__ = ["GEMMS", "GLOBAL", "MIXED", "RECIPES", "ROWWISE", "Cast", "Gemm", "Recipe"]


@dataclass(frozen=True)
class Cast:
    """How one operand of a GEMM is quantized.

    Attributes:
        format: E4M3 or E5M2.
        granularity: what has a scale. `tensor` is the whole; `row` a row of a, or an output channel of a weight;
            `block` a block of a row, along the contracted dimension.
    """

    format: Format
    granularity: Literal["tensor", "row", "block"]

    @property
    def transposes(self) -> bool:
        """Whether a tensor's scale is its transpose's also."""
        return self.granularity == "tensor"

    def shares_scale(self, other: Cast) -> bool:
        """Whether a tensor that this cast quantizes has the same scale as its transpose has by `other`."""
        return self == other and self.transposes


@dataclass(frozen=True)
class Gemm:
    """The two operands of `lhs @ rhs.T`, both laid out (rows, contracted dimension)."""

    lhs: Cast
    rhs: Cast

    def __post_init__(self) -> None:
        if self.lhs.format.dtype == self.rhs.format.dtype == torch.float8_e5m2:
            raise ConfigError(
                "a GEMM of two E5M2 operands was asked for; tensor cores multiply at most one E5M2 operand"
            )


@dataclass(frozen=True)
class Recipe:
    """Which operand of which of a linear's three GEMMs is quantized, and how; None keeps that GEMM in high precision.

    Attributes:
        name: the op is `torch.ops.fp8fx.matmul_fp8_<name>`.
        forward: a (M, K) and b^T (N, K).
        dgrad: grad (M, N) and b (K, N).
        wgrad: a^T (K, M) and grad^T (N, M).
    """

    name: str
    forward: Gemm | None
    dgrad: Gemm | None
    wgrad: Gemm | None

    def __post_init__(self) -> None:
        # A block of the contracted dimension of one GEMM is not one of the other, and b's and wgrad's have no bsz.
        unblocked = [gemm.rhs for gemm in (self.forward, self.dgrad, self.wgrad) if gemm]
        if self.wgrad:
            unblocked.append(self.wgrad.lhs)
        if any(cast.granularity == "block" for cast in unblocked):
            raise ConfigError(
                f"recipe {self.name!r} blocks a weight or a wgrad operand; only a and dgrad's grad take blocks"
            )

    @property
    def gemms(self) -> tuple[str, ...]:
        """The GEMMs that it computes in FP8."""
        return tuple(name for name in GEMMS if getattr(self, name) is not None)

    def only(self, gemms: Iterable[str]) -> Recipe:
        """The recipe with all other GEMMs in high precision."""
        kept = set(gemms)
        return Recipe(self.name, *(getattr(self, name) if name in kept else None for name in GEMMS))


GEMMS = ("forward", "dgrad", "wgrad")
"""A linear's three: the output, the input's gradient, the weight's."""


_TENSOR = Cast(E4M3, "tensor")
_GRAD = Cast(E5M2, "tensor")
_ROW = Cast(E4M3_FULL, "row")


MIXED = Recipe("mixed", Gemm(Cast(E4M3, "block"), _TENSOR), Gemm(Cast(E5M2, "block"), _TENSOR), wgrad=None)
GLOBAL = Recipe("global", Gemm(_TENSOR, _TENSOR), Gemm(_GRAD, _TENSOR), Gemm(_TENSOR, _GRAD))
ROWWISE = Recipe("rowwise", Gemm(_ROW, _ROW), Gemm(_ROW, _ROW), Gemm(_ROW, _ROW))


RECIPES: Mapping[str, Recipe] = {recipe.name: recipe for recipe in (MIXED, GLOBAL, ROWWISE)}
"""Every recipe by its name."""
