"""An FP8 tensor: data and scale, which stand for their product. What torch does with one is in `fp8_operators.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from fp8fx.errors import FreezeError
from fp8fx.recipes.formats import LADDER
from fp8fx.recipes.quantize import Quantized, quantize, quantize_experts, scale_of
from fp8fx.recipes.recipe import RECIPES, Cast, Recipe
from fp8fx.torch_internals import disabled_torch_function, dispatch_modes, make_wrapper_subclass

__all__ = ["FP8Tensor", "quantize_weight", "rebuilt"]

_INNER = ["qdata", "scale"]


_PIECE = 1 << 22
"""So many values of a weight are quantized at once. More would take several times the memory of the weight."""


def _in_pieces(rows: Tensor, cast: Cast, block: int = LADDER[-1]) -> Quantized:
    """As `quantize`, bit for bit, of (rows, features) with a scale a row or one: some rows after the other."""
    if rows.numel() <= _PIECE or dispatch_modes():
        return quantize(rows, cast, block)
    count = max(_PIECE // rows.shape[1], 1)
    pieces = rows.split(count)
    scale = None
    if cast.granularity == "tensor":
        scale = scale_of(torch.stack([piece.abs().amax() for piece in pieces]).amax(), cast.format)
    data = rows.new_empty(rows.shape, dtype=cast.format.dtype)
    scales = []
    for piece, place in zip(pieces, data.split(count), strict=True):
        q = quantize(piece, cast, block, scale)
        place.copy_(q.data)
        scales.append(q.scale)
    return Quantized(data, torch.cat(scales) if scale is None else scale)  # type: ignore[arg-type]


def quantize_weight(value: Tensor, recipe: Recipe) -> Quantized:
    """A weight (N, K), or several experts' (E, N, K), as FP8 data of this shape and a scale that multiplies it.

    The scale is (N, 1) or (E, N, 1). It is (1, 1) if neither operand of the GEMM has more than one. Besides the data
    this takes memory for some rows, or for one expert's weight.
    """
    gemm = recipe.forward
    assert gemm is not None
    if value.dim() == 3:
        data, scale = quantize_experts(value, gemm.rhs, _in_pieces)
        assert scale is not None
        return Quantized(data, scale.unsqueeze(-1))
    data, scale = _in_pieces(value, gemm.rhs)
    assert scale is not None
    if gemm.lhs.granularity == "tensor":
        return Quantized(data.contiguous(), scale.reshape(1, 1))
    return Quantized(data.contiguous(), scale.expand(len(data), 1).contiguous())


class FP8Tensor(Tensor):
    """A weight (N, K), or (E, N, K) of several experts, or a view of one.

    Attributes:
        qdata: the FP8 values, in the weight's shape. K lies densely.
        scale: float32, broadcast against qdata: `qdata * scale` is the weight.
        recipe: which FP8 matmul reads it.
        is_part: whether it is a view of a part of a weight, which may share its scale with the rest.
    """

    qdata: Tensor
    scale: Tensor
    recipe: str
    is_part: bool
    _flat: tuple[list[str], tuple[str, torch.dtype, bool]]

    __torch_function__ = disabled_torch_function

    @classmethod
    def of(cls, qdata: Tensor, scale: Tensor | None, recipe: str, dtype: torch.dtype, is_part: bool = False) -> Self:
        """The tensor of this data and scale, no copies of them, which the model sees in `dtype`."""
        made: Self = make_wrapper_subclass(
            cls, qdata.shape, strides=qdata.stride(), dtype=dtype, device=qdata.device, requires_grad=False
        )
        assert scale is not None
        made.qdata = qdata
        made.scale = scale
        made.recipe = recipe
        made.is_part = is_part
        made._flat = _INNER, (recipe, dtype, is_part)
        return made

    def like(self, qdata: Tensor, scale: Tensor) -> Self:
        """Another of the same kind, of this data and scale."""
        return type(self).of(qdata, scale, self.recipe, self.dtype, self.is_part)

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        return self._flat  # guards ask for it twice in each call

    @classmethod
    def __tensor_unflatten__(cls, inner: Mapping[str, Tensor], meta: tuple[Any, ...], size: Any, stride: Any) -> Self:
        return cls.of(inner["qdata"], inner["scale"], *meta)

    def __repr__(self) -> str:  # type: ignore[override]
        where = f"dtype={self.dtype}, device={str(self.device)!r}"
        return f"{type(self).__name__}({tuple(self.shape)}, recipe={self.recipe!r}, {where})"

    def dequantize(self) -> Tensor:
        """The values, in high precision: a new tensor of the weight's dtype."""
        return (self.qdata.float() * self.scale).to(self.dtype)

    def is_k(self, dim: int) -> bool:
        """Whether a dimension is the K of linears, over which FP8 products sum: it has no scales, and lies densely."""
        return self.scale.shape[dim] == 1 and self.qdata.stride(dim) == 1

    @property
    def contracts_k(self) -> bool:
        """Whether a product that has it on the right, (K, N) or (E, K, N), sums over the K of linears."""
        return self.is_k(-2)

    def as_operand(self) -> tuple[Tensor, Tensor]:
        """FP8 data (K, N) and scale, () or (N, 1), as the ops take them, of a weight that is seen as (K, N).

        Of several experts (E, K, N) the scale is (E, N).

        Raises:
            FreezeError: it has scales along K.
        """
        if self.scale.shape[-2] != 1:
            raise FreezeError(
                f"an FP8 matmul got an FP8 weight {tuple(self.shape)} whose scale {tuple(self.scale.shape)} varies "
                "along K; expected (K, N) with a scale for each of N: pass weight.t()"
            )
        if self.dim() == 3:
            return self.qdata, self.scale.squeeze(-2).expand(self.shape[0], self.shape[2])
        has_one = self.scale.shape[1] == 1 != self.shape[1]
        return self.qdata, self.scale.reshape(()) if has_one else self.scale.t()

    @property
    def data(self) -> Tensor:
        """The weight itself, outside of autograd. To set it writes to the weight."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if value.shape != self.shape or value.device != self.device:
            raise FreezeError(
                f"the data of an FP8 weight {tuple(self.shape)} on {self.device} was set to {tuple(value.shape)} on "
                f"{value.device}; expected the same shape and device: assign a new fp8fx.FP8Weight to the module"
            )
        with torch.no_grad():
            self.write(value)

    def data_ptr(self) -> int:
        """The address of `qdata`."""
        return self.qdata.data_ptr()

    def share_memory_(self) -> Self:
        """Moves data and scale to shared memory."""
        self.qdata.share_memory_()
        self.scale.share_memory_()
        return self

    def is_shared(self) -> bool:
        """Whether data and scale are in shared memory."""
        return bool(self.qdata.is_shared() and self.scale.is_shared())

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            memo[id(self)] = _as_was(self.detach().clone(), isinstance(self, nn.Parameter))
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # As bytes: pickle, other than torch.save, does not read float8 tensors.
        data = self.qdata.detach().view(torch.uint8), self.qdata.dtype
        meta = self.recipe, self.dtype, self.is_part
        return rebuilt, (type(self), *data, self.scale.detach(), meta, isinstance(self, nn.Parameter))

    def write(self, value: Tensor) -> None:
        """Takes new values, in place: quantizes them, or copies those of an FP8 weight of the same recipe.

        Raises:
            FreezeError: it is a part of a weight, or the value is FP8 data without a scale.
        """
        if self.is_part:
            raise FreezeError(
                f"a part {tuple(self.shape)} of an FP8 weight was written to, whose scale may be that of more; "
                "write the whole weight: weight.copy_(value)"
            )
        if isinstance(value, FP8Tensor) and value.recipe == self.recipe and value.scale.shape == self.scale.shape:
            self.qdata.copy_(value.qdata)
            self.scale.copy_(value.scale)
            return
        if isinstance(value, FP8Tensor):
            value = value.dequantize()
        if value.dtype.itemsize == 1 and value.is_floating_point():
            raise FreezeError(
                f"{value.dtype} values without their scale were written to an FP8 weight; expected values in high "
                "precision, which are quantized, or an fp8fx.FP8Weight"
            )
        value = value.expand(self.shape).to(self.device)
        k = self.contracted
        data, scale = quantize_weight(value.movedim(k, -1), RECIPES[self.recipe])
        assert scale is not None
        self.qdata.copy_(data.movedim(-1, k))
        self.scale.copy_(scale.movedim(-1, k))

    @property
    def contracted(self) -> int:
        """The dimension that a linear contracts: that whose values lie side by side."""
        rows, columns = self.scale.shape[-2:]
        if rows != columns:
            return -1 if columns == 1 else -2
        gemm = RECIPES[self.recipe].forward
        assert gemm is not None
        if self.shape[-1] == 1 and gemm.lhs.granularity != "tensor":
            return -2  # (K, 1), whose strides do not tell: (N, 1) has N scales
        return -1 if self.qdata.stride(-1) == 1 else -2


def _as_was(made: Tensor, is_parameter: bool) -> Any:
    return nn.Parameter(made, requires_grad=False) if is_parameter else made


def rebuilt(
    kind: type[FP8Tensor],
    data: Tensor,
    format: torch.dtype,
    scale: Tensor,
    meta: tuple[str, torch.dtype, bool],
    is_parameter: bool,
) -> Any:
    """The tensor that a pickle is of."""
    return _as_was(kind.of(data.view(format), scale, *meta), is_parameter)
