"""LinearFP8Mixed, LinearFP8Global and LinearFP8Rowwise: drop-in for nn.Linear, for models that are built rather than compiled."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from fp8fx.errors import GraphError
from fp8fx.executors import registry
from fp8fx.ops.matmul import op
from fp8fx.recipes.formats import block_size

__all__ = ["LinearFP8Global", "LinearFP8Mixed", "LinearFP8Rowwise"]


class _LinearFP8(nn.Linear):
    """nn.Linear whose three GEMMs follow a recipe. The state dict is nn.Linear's, both ways.

    Args:
        in_features, out_features, bias, device, dtype: as nn.Linear's.
        executor: `auto`, `scaled_mm`, `simulated` or `bitsandbytes`.

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
        """The same linear in FP8: it holds `linear`'s own parameters, not copies. Keyword arguments as the constructor's.

        Raises:
            GraphError: not an nn.Linear.
        """
        if not isinstance(linear, nn.Linear):
            raise GraphError(f"from_linear got a {type(linear).__name__}; expected an nn.Linear")
        new = cls(
            linear.in_features, linear.out_features, linear.bias is not None, "meta", linear.weight.dtype, **kwargs
        )
        new.weight, new.bias = linear.weight, linear.bias
        return new.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """(*, in_features) -> (*, out_features), in the input's dtype."""
        return op(self.recipe)(input, self.weight.t(), bias=self.bias, executor=self.executor)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """nn.Linear's, with the recipe, the derived block sizes and the executor."""
        sizes = ", ".join(
            f"{name}={block_size(features)}"
            for name, features in (("bsz", self.in_features), ("bsz2", self.out_features))
            if features
        )
        return f"{super().extra_repr()}, recipe={self.recipe}, {sizes}, executor={self.executor}"


class LinearFP8Mixed(_LinearFP8):
    """nn.Linear with a scale per block of a row of the input and one per weight; wgrad in high precision.

    (*, in_features) -> (*, out_features) in the input's dtype: float32, float16 or bfloat16. The weight (out_features, in_features), the
    bias (out_features,) and the state dict are nn.Linear's.

    Args:
        in_features, out_features, bias, device, dtype: as nn.Linear's.
        executor: `auto`, `scaled_mm`, `simulated` or `bitsandbytes`.

    Raises:
        ConfigError: an unknown executor.
        DTypeError, ShapeError, ExecutorError: when called, as `torch.ops.fp8fx.matmul_fp8_mixed`.
    """

    recipe = "mixed"


class LinearFP8Global(_LinearFP8):
    """nn.Linear with one scale per tensor, in all three GEMMs. Arguments, shapes and errors as LinearFP8Mixed's."""

    recipe = "global"


class LinearFP8Rowwise(_LinearFP8):
    """nn.Linear with a scale per row of the input and per output channel of the weight, in all three GEMMs.

    Arguments, shapes and errors as LinearFP8Mixed's.
    """

    recipe = "rowwise"
