"""What the user can ask for: the recipe (data) and the configuration of the rewrite. Both frozen and validated."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import torch

from fp8fx.errors import ConfigError
from fp8fx.formats import E4M3, E4M3_FULL, E5M2, Format

__all__ = ["EXECUTORS", "GEMMS", "GLOBAL", "MIXED", "PROFITS", "RECIPES", "ROWWISE", "Cast", "Config", "Gemm", "Recipe", "unknown"]


@dataclass(frozen=True)
class Cast:
    """How one operand of a GEMM is quantized.

    Attributes:
        format: E4M3 or E5M2.
        granularity: `tensor` for one scale, `row` for one per row (a row of a; of a weight an output channel), `block` for one
            per block of a row, along the contracted dimension.
    """

    format: Format
    granularity: Literal["tensor", "row", "block"]

    @property
    def transposes(self) -> bool:
        """Whether a tensor's scale is its transpose's too."""
        return self.granularity == "tensor"


@dataclass(frozen=True)
class Gemm:
    """The two operands of `lhs @ rhs.T`, both laid out (rows, contracted dimension)."""

    lhs: Cast
    rhs: Cast

    def __post_init__(self) -> None:
        if self.lhs.format.dtype == self.rhs.format.dtype == torch.float8_e5m2:
            raise ConfigError("a GEMM of two E5M2 operands was asked for; tensor cores multiply at most one E5M2 operand")


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
        unblocked = [gemm.rhs for gemm in (self.forward, self.dgrad, self.wgrad) if gemm] + ([self.wgrad.lhs] if self.wgrad else [])
        if any(cast.granularity == "block" for cast in unblocked):
            raise ConfigError(f"recipe {self.name!r} blocks a weight or a wgrad operand; only a and dgrad's grad take blocks")

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

_A, _B, _GRAD = Cast(E4M3, "tensor"), Cast(E4M3, "tensor"), Cast(E5M2, "tensor")

MIXED = Recipe(
    "mixed",
    forward=Gemm(Cast(E4M3, "block"), _B),
    dgrad=Gemm(Cast(E5M2, "block"), _B),
    wgrad=None,
)
GLOBAL = Recipe("global", forward=Gemm(_A, _B), dgrad=Gemm(_GRAD, _B), wgrad=Gemm(_A, _GRAD))

_ROW = Cast(E4M3_FULL, "row")
ROWWISE = Recipe("rowwise", forward=Gemm(_ROW, _ROW), dgrad=Gemm(_ROW, _ROW), wgrad=Gemm(_ROW, _ROW))

RECIPES: Mapping[str, Recipe] = {recipe.name: recipe for recipe in (MIXED, GLOBAL, ROWWISE)}
EXECUTORS = ("auto", "scaled_mm", "simulated", "bitsandbytes")
PROFITS = ("auto", "always", "never")


def unknown(what: str, given: object, valid: Iterable[str]) -> ConfigError:
    """The error for a name outside `valid`, with the nearest valid one."""
    names = sorted(valid)
    close = difflib.get_close_matches(str(given), names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return ConfigError(f"unknown {what} {given!r}; expected one of {', '.join(names)}.{hint}")


@dataclass(frozen=True)
class Config:
    """The configuration of one rewrite.

    Attributes:
        recipe: `mixed` (a scale per block of a, one per weight; wgrad in high precision), `global` (a scale per tensor) or
            `rowwise` (a scale per row of a and per output channel of a weight, E4M3 up to 448).
        executor: `auto`, `scaled_mm`, `simulated` or `bitsandbytes`.
        include: fnmatch patterns; a linear is rewritten if its module path or its weight's name matches one.
        exclude: fnmatch patterns; a linear that matches one is left alone, whatever `include` says.
        min_features: a linear with K or N below this is left alone; 0 leaves none for its size.
        routers: take linears that route too: those whose topk chooses experts. Else they stay in high precision, since a choice that flips
            changes a token's output altogether.
        convolutions: take convolutions with kernels of size 1 too, which are linears of every pixel's channels.
        profit: `auto` leaves a GEMM in high precision where FP8 tensor cores would not pay for quantizing its operands, by times
            measured on the device (`fp8fx.profit`; where there are none, nothing is left out); `always` takes every GEMM that the
            recipe has, `never` none.
        freeze: quantize the weights once, when the model is compiled or converted, for inference. A promise that they do not change
            afterwards but by `fp8fx.refresh`.

    Raises:
        ConfigError: a value is not one of the above.
    """

    recipe: str = "mixed"
    executor: str = "auto"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    min_features: int = 0
    routers: bool = False
    convolutions: bool = False
    profit: str = "auto"
    freeze: bool = False

    def __post_init__(self) -> None:
        if self.recipe not in tuple(RECIPES):
            raise unknown("recipe", self.recipe, RECIPES)
        if self.executor not in EXECUTORS:
            raise unknown("executor", self.executor, EXECUTORS)
        if self.profit not in PROFITS:
            raise unknown("profit", self.profit, PROFITS)
        for name in ("include", "exclude"):
            value = getattr(self, name)
            patterns = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, (list, tuple)) else None
            if patterns is None or not all(isinstance(p, str) for p in patterns):
                raise ConfigError(f"{name}={value!r} is not a pattern or a list of them; expected fnmatch patterns such as 'layers.*'")
            object.__setattr__(self, name, patterns)
        if type(self.min_features) is not int or self.min_features < 0:
            raise ConfigError(f"min_features={self.min_features!r} is not a feature count; expected an int of at least 0")
        for name in ("routers", "convolutions", "freeze"):
            if type(getattr(self, name)) is not bool:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not a bool; expected True or False")

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of the options."""
        return tuple(f.name for f in fields(cls))

    @classmethod
    def of(cls, config: Config | None, options: Mapping[str, Any]) -> Config:
        """`config` (default: `Config()`) with `options` put over it.

        Raises:
            ConfigError: an unknown option or value, or a `config` that is not a Config.
        """
        if config is not None and not isinstance(config, cls):
            raise ConfigError(f"config is a {type(config).__name__}; expected fp8fx.Config(...), or options by name")
        for name in options:
            if name not in cls.names():
                raise unknown("option", name, cls.names())
        return replace(config or cls(), **options)

    def key(self) -> str:
        """A text that differs wherever the rewrite could: part of the compile cache's key."""
        return repr((sorted(asdict(self).items()), RECIPES[self.recipe]))
