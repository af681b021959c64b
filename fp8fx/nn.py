"""LinearFP8Mixed, LinearFP8Global and LinearFP8Rowwise: drop-in for nn.Linear, for models that are built, not compiled.

Each recipe of the table has a module here, `LinearFP8<Recipe>`. A recipe without a class below gets one when this is
imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from fp8fx.errors import GraphError
from fp8fx.executors import registry
from fp8fx.ops.matmul import op
from fp8fx.recipes.formats import block_size
from fp8fx.recipes.recipe import RECIPES, Recipe

__all__ = ["MODULES", "LinearFP8", "LinearFP8Global", "LinearFP8Mixed", "LinearFP8Rowwise"]


class LinearFP8(nn.Linear):
    """nn.Linear whose three GEMMs follow a recipe. The base of the modules, not one itself.

    The state dict is nn.Linear's, both ways.

    Args:
        in_features, out_features, bias, device, dtype: as nn.Linear's.
        executor: `auto`, or the name of one: `scaled_mm`, `simulated` or `bitsandbytes`.

    Raises:
        ConfigError: an unknown executor.
    """

    recipe: ClassVar[str]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        executor: str = "auto",
    ) -> None:
        registry.check_name(executor)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.executor = executor

    @classmethod
    def from_linear(cls, linear: nn.Linear, **kwargs: Any) -> Self:
        """The same linear in FP8: it holds `linear`'s own parameters, not copies. `kwargs` as the constructor's.

        Raises:
            GraphError: not an nn.Linear.
        """
        if not isinstance(linear, nn.Linear):
            raise GraphError(f"from_linear got a {type(linear).__name__}; expected an nn.Linear")
        has_bias = linear.bias is not None
        new = cls(linear.in_features, linear.out_features, has_bias, "meta", linear.weight.dtype, **kwargs)
        new.weight = linear.weight
        new.bias = linear.bias
        return new.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """(*, in_features) -> (*, out_features), in the input's dtype."""
        product: Tensor = op(self.recipe)(input, self.weight.t(), bias=self.bias, executor=self.executor)
        return product

    def extra_repr(self) -> str:
        """nn.Linear's, with the recipe, the derived block sizes and the executor."""
        features = {"bsz": self.in_features, "bsz2": self.out_features}
        sizes = ", ".join(f"{name}={block_size(count)}" for name, count in features.items() if count)
        return f"{super().extra_repr()}, recipe={self.recipe}, {sizes}, executor={self.executor}"


class LinearFP8Mixed(LinearFP8):
    """nn.Linear with a scale per block of a row of the input and one per weight; wgrad in high precision.

    (*, in_features) -> (*, out_features) in the input's dtype: float32, float16 or bfloat16. The weight
    (out_features, in_features), the bias (out_features,) and the state dict are nn.Linear's.

    Args:
        in_features, out_features, bias, device, dtype: as nn.Linear's.
        executor: `auto`, or the name of one: `scaled_mm`, `simulated` or `bitsandbytes`.

    Raises:
        ConfigError: an unknown executor.
        DTypeError, ShapeError, ExecutorError: when called, as `torch.ops.fp8fx.matmul_fp8_mixed`.

    Example:
        >>> LinearFP8Mixed(64, 32)(torch.randn(2, 64)).shape
        torch.Size([2, 32])
    """

    recipe = "mixed"


class LinearFP8Global(LinearFP8):
    """nn.Linear with one scale per tensor, in all three GEMMs. Arguments, shapes and errors as LinearFP8Mixed's."""

    recipe = "global"


class LinearFP8Rowwise(LinearFP8):
    """nn.Linear with a scale per row of the input and per output channel of the weight, in all three GEMMs.

    Arguments, shapes and errors as LinearFP8Mixed's.
    """

    recipe = "rowwise"


def _module(recipe: Recipe) -> type[LinearFP8]:
    """The recipe's class above, or a new one of this module, so that it can be pickled."""
    name = f"LinearFP8{recipe.name.title().replace('_', '')}"
    if name not in globals():
        doc = f"nn.Linear by the recipe {recipe.name!r}. Arguments, shapes and errors as LinearFP8Mixed's."
        globals()[name] = type(name, (LinearFP8,), {"__doc__": doc, "__module__": __name__, "recipe": recipe.name})
    module: type[LinearFP8] = globals()[name]
    return module


MODULES: Mapping[str, type[LinearFP8]] = {name: _module(recipe) for name, recipe in RECIPES.items()}
"""The module of each recipe, by the recipe's name."""
