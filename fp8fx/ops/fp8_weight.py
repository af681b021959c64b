"""A weight in FP8 that is part of a model: a tensor that holds data and scale, and stands for their product.

To torch it is a parameter of the model's own dtype. What reads it as a linear does is an FP8 matmul of its recipe,
eagerly and in every compiler. Everything else reads the dequantized values. What is written to it is quantized.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fp8fx.errors import DTypeError, FreezeError, ShapeError, unknown
from fp8fx.ops.fp8_operators import dispatch
from fp8fx.ops.fp8_tensor import FP8Tensor, quantize_weight, rebuilt
from fp8fx.ops.operands import DTYPES
from fp8fx.recipes.recipe import RECIPES

__all__ = ["FP8Weight"]


class FP8Weight(FP8Tensor):
    """A parameter (N, K), or (E, N, K) of several experts, in FP8.

    Args:
        value: a weight in high precision, which is quantized; or an FP8 weight, which is taken as it is.
        recipe: the name of one of `fp8fx.recipes.recipe.RECIPES`.
        requires_grad: False. FP8 weights are not trained.
        transposed: whether the value is written the other way round, (K, N) or (E, K, N). The parameter is then, too:
            a view of data that lies as (N, K).

    Raises:
        ConfigError: an unknown recipe.
        DTypeError: the value is not float32, float16 or bfloat16.
        ShapeError: the value has neither two dimensions nor three.
        FreezeError: the value is not finite, or the parameter is to require grad.

    Source: torchao's Float8Tensor and DTensor are traceable wrapper subclasses of the same kind.

    >>> weight = FP8Weight(torch.eye(32))
    >>> weight.qdata.dtype, weight.scale.shape, weight.dtype
    (torch.float8_e4m3fn, torch.Size([32, 1]), torch.float32)
    >>> bool(torch.nn.functional.linear(torch.ones(2, 32), weight).allclose(torch.ones(2, 32)))
    True
    """

    @staticmethod
    def __new__(  # noqa: D102
        cls, value: Tensor, recipe: str = "rowwise", requires_grad: bool = False, *, transposed: bool = False
    ) -> FP8Weight:
        if requires_grad:
            _refuse_training()
        if recipe not in RECIPES:
            raise unknown("recipe", recipe, RECIPES)
        if not isinstance(value, FP8Tensor):
            value = cls._quantized(value, recipe, transposed)
        return nn.Parameter(value, requires_grad=False)  # type: ignore[return-value]

    @classmethod
    def _quantized(cls, value: Tensor, recipe: str, transposed: bool) -> FP8Weight:
        if value.dtype not in DTYPES:
            raise DTypeError(f"FP8Weight got {value.dtype}; expected float32, float16 or bfloat16 (use .to)")
        if value.dim() not in (2, 3):
            raise ShapeError(f"FP8Weight got {tuple(value.shape)}; expected (N, K), or (E, N, K) of experts")
        with torch.inference_mode(False), torch.no_grad():
            value = value.detach()
            data, scale = quantize_weight(value.mT if transposed else value, RECIPES[recipe])
        assert scale is not None
        if scale.device.type != "meta" and not bool(scale.isfinite().all()):
            raise FreezeError("inf or NaN in a weight that was to be FP8; expected finite values")
        if _are_codes(value.mT if transposed else value, data, scale):
            raise FreezeError(
                "FP8 codes in place of a weight's values, as if the scale had been lost in loading or offloading; "
                "pass the values, or an FP8Weight"
            )
        if transposed:
            data, scale = data.mT, scale.mT
        return cls.of(data, scale, recipe, value.dtype)

    @property
    def is_transposed(self) -> bool:
        """Whether it is (K, N), a view of data that lies as (N, K)."""
        return self.contracted == -2

    def requires_grad_(self, requires_grad: bool = True) -> FP8Weight:
        """Raises FreezeError if it is to require grad."""
        if requires_grad:
            _refuse_training()
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return dispatch(func, args, kwargs or {})


def _are_codes(value: Tensor, data: Tensor, scale: Tensor) -> bool:
    """Whether a weight's values are themselves the values of an FP8 weight's data."""
    if value.is_meta or value.numel() < _FEWEST_CODES or not bool((scale == 1).all()):
        return False
    return bool((data.float() == value).all())


_FEWEST_CODES = 256
"""So many values do not lie on the format's grid, with a largest of the format's own, by chance."""


def _refuse_training() -> NoReturn:
    raise FreezeError(
        "an FP8 weight was told to require grad; its steps would be lost in rounding. Train the model before it is "
        "frozen, or adapters beside it (LoRA), or leave this weight in high precision: fp8fx.freeze(model, exclude=...)"
    )


torch.serialization.add_safe_globals([FP8Weight, rebuilt])
