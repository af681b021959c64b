"""What the user can ask for. Frozen and validated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from fp8fx.errors import ConfigError, unknown
from fp8fx.executors import registry
from fp8fx.recipes.recipe import RECIPES

__all__ = ["ATTENTIONS", "LAYERS", "PROFITS", "Config"]

PROFITS = ("auto", "always", "never")
ATTENTIONS = ("auto", "leave")
LAYERS = ("once", "each")


def _patterns(name: str, value: Any) -> tuple[str, ...]:
    """The option's value as a tuple of patterns; a text is one."""
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, (list, tuple)) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ConfigError(
            f"{name}={value!r} is not a pattern or a list of them; expected fnmatch patterns such as 'layers.*'"
        )
    return tuple(patterns)


@dataclass(frozen=True)
class Config:
    """The configuration of one rewrite.

    Attributes:
        recipe: the name of one of `fp8fx.recipes.recipe.RECIPES`. `mixed` has a scale per block of a and one per
            weight, and wgrad in high precision; `global` a scale per tensor; `rowwise` a scale per row of a and per
            output channel of a weight, in E4M3 up to 448.
        executor: `auto`, or the name of one of `fp8fx.executors.registry.EXECUTORS`: `scaled_mm`, `simulated` or
            `bitsandbytes`.
        include: fnmatch patterns; a linear is rewritten if its module path or its weight's name matches one.
        exclude: fnmatch patterns; a linear that matches one is left alone, whatever `include` says.
        min_features: a linear with K or N below this is left alone; 0 leaves none for its size.
        routers: also take linears that route: those whose topk chooses experts. Otherwise they stay in high precision,
            since a choice that flips changes a token's output altogether.
        convolutions: also take convolutions with kernels of size 1, which are linears of every pixel's channels.
        profit: `auto` leaves a GEMM in high precision if FP8 tensor cores would not pay for quantizing its operands, by
            times measured on the device (`fp8fx.profit`; if there are none, nothing is left out). `always` takes every
            GEMM that the recipe has, `never` none.
        freeze: quantize the weights once, for inference. Behind torch.compile a weight that has changed is quantized
            anew; after a write through `.data` alone, call `fp8fx.refresh`. `convert` returns a graph of FP8 weights.
        attention: `auto` leaves out attention masks that are proved to be causal, or to hide nothing; `leave` none.
        layers: `once` compiles equal layers once and calls the code for each; `each` compiles each, as Inductor does.

    Raises:
        ConfigError: a value is not one of the above.

    Example:
        >>> Config(recipe="rowwise", exclude="lm_head").exclude
        ('lm_head',)
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
    attention: str = "auto"
    layers: str = "once"

    def __post_init__(self) -> None:
        if self.recipe not in tuple(RECIPES):  # a tuple, for a value that has no hash
            raise unknown("recipe", self.recipe, RECIPES)
        registry.check_name(self.executor)
        if self.profit not in PROFITS:
            raise unknown("profit", self.profit, PROFITS)
        if self.attention not in ATTENTIONS:
            raise unknown("attention", self.attention, ATTENTIONS)
        if self.layers not in LAYERS:
            raise unknown("layers", self.layers, LAYERS)
        for name in ("include", "exclude"):
            object.__setattr__(self, name, _patterns(name, getattr(self, name)))
        if type(self.min_features) is not int or self.min_features < 0:
            raise ConfigError(
                f"min_features={self.min_features!r} is not a feature count; expected an int of at least 0"
            )
        for name in ("routers", "convolutions", "freeze"):
            if type(getattr(self, name)) is not bool:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not a bool; expected True or False")

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of the options."""
        return tuple(field.name for field in fields(cls))

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
