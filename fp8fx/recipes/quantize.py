"""amax -> scale -> cast, and back. Plain torch, so that Inductor fuses it into whatever stands around it.

The arithmetic gives the same bits in eager mode and under Inductor, on CPU and CUDA. The one division is done in
float64, which every compiler rounds correctly; Triton's float32 division does not. And no value can leave the format's
range: there casts differ (eager CUDA gives NaN or inf, Inductor and the CPU saturate).

`pattern.py` says what this is in Inductor's graphs. Who changes one changes both; tests/recipes/test_pattern.py
compares them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8fx.recipes.formats import E4M3, Format, blocks_per_row  # noqa: F401 - E4M3 for the examples
from fp8fx.recipes.recipe import Cast
from fp8fx.torch_internals import guard_or_false

__all__ = ["Quantized", "dequantize", "quantize", "quantize_experts", "scale_of", "sqnr"]

_SMALLEST_SCALE = 2.0**-125
"""Keeps the scale and its reciprocal normal float32 numbers. A block of zeros stays zero."""


class Quantized(NamedTuple):
    """An operand laid out (rows, contracted dimension), quantized.

    Attributes:
        data: the FP8 values, (rows, features).
        scale: float32, `data * scale` is the value. () for one per tensor, (rows, blocks) for one per block of a row,
            (rows, 1) for one per row. None if the executor keeps none: `data` is dequantized already.
    """

    data: Tensor
    scale: Tensor | None


def scale_of(amax: Tensor, fmt: Format) -> Tensor:
    """The float32 scale that maps `amax` to the format's target. Non-finite in, non-finite out.

    >>> scale_of(torch.tensor(480.0), E4M3)
    tensor(2.)
    """
    return (amax.double() / fmt.target).clamp(min=_SMALLEST_SCALE).float()


def _cast(x: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    """`x / scale` in the format."""
    # An inf or NaN in x makes its scale non-finite, so that the product with the scale is NaN whatever the cast gives.
    # The reciprocal overshoots the target by an ulp at most, far less than half a step of the grid.
    return (x.float() * scale.double().reciprocal().float()).to(fmt.dtype)


def quantize(x: Tensor, cast: Cast, block: int, scale: Tensor | None = None) -> Quantized:
    """Quantizes `x` (rows, features), floating point, as `cast` says.

    Args:
        x: what is quantized. A non-finite value makes its own block's scale non-finite.
        cast: the format, and what has a scale.
        block: the block size along a row, from the ladder; casts per tensor and per row ignore it. Blocks never
            straddle two rows; the last one of a row may be short.
        scale: that of the same values in another layout, for a cast per tensor.

    Example:
        >>> data, scale = quantize(torch.randn(3, 200), Cast(E4M3, "block"), 64)
        >>> data.shape, data.dtype, scale.shape
        (torch.Size([3, 200]), torch.float8_e4m3fn, torch.Size([3, 4]))
    """
    if cast.granularity == "tensor":
        if scale is None:
            # amax refuses an empty tensor, and how many rows there are may be known at run time only.
            magnitudes = x.abs() if guard_or_false(x.numel() > 0) else F.pad(x.abs(), (0, 1, 0, 1))
            scale = scale_of(magnitudes.amax(), cast.format)
        return Quantized(_cast(x, scale, cast.format), scale)
    rows, features = x.shape
    blocks = 1 if cast.granularity == "row" else blocks_per_row(features, block)
    if blocks == 1:
        # As above: wgrad's rows are M long.
        magnitudes = x.abs() if guard_or_false(features > 0) else F.pad(x.abs(), (0, 1))
        scale = scale_of(magnitudes.amax(-1, keepdim=True), cast.format)
        return Quantized(_cast(x, scale, cast.format), scale)
    tiles = F.pad(x, (0, blocks * block - features)).reshape(rows, blocks, block)
    scale = scale_of(tiles.abs().amax(-1), cast.format)
    data = _cast(tiles, scale.unsqueeze(-1), cast.format).reshape(rows, blocks * block)
    return Quantized(data[:, :features], scale)


def quantize_experts(
    weights: Tensor, cast: Cast, quantize: Callable[[Tensor, Cast, int], Quantized] = quantize
) -> Quantized:
    """The weights (E, N, K) in FP8 and a scale per output channel (E, N); equal ones if the recipe has one per weight.

    `quantize` is an executor's. One that keeps no FP8 weights gives values of the weights' dtype and no scale.
    """
    e, n, k = weights.shape
    has_one_scale = cast.granularity == "tensor"  # an expert's weight as one row has one
    rows = weights.reshape(e, n * k) if has_one_scale else weights.reshape(e * n, k)
    q = quantize(rows, Cast(cast.format, "row"), -1)
    scale = q.scale
    if scale is not None:
        scale = (scale.expand(e, n) if has_one_scale else scale.view(e, n)).contiguous()
    return Quantized(q.data.view(e, n, k).contiguous(), scale)  # a view if the weights lie as (N, K, E)


def dequantize(q: Quantized, block: int, dtype: torch.dtype) -> Tensor:
    """The values of `q` (rows, features) in `dtype`; `block` as given to `quantize`."""
    if q.scale is None:
        return q.data.to(dtype)
    scale = q.scale
    if scale.dim() == 2 and scale.shape[1] > 1:
        scale = scale.repeat_interleave(block, 1)[:, : q.data.shape[1]]
    return (q.data.float() * scale).to(dtype)


def sqnr(reference: Tensor, value: Tensor) -> float:
    """Signal-to-quantization-noise ratio in dB, over the whole tensor and in float64.

    It is 20 log10(|reference| / |reference - value|).
    """
    reference = reference.detach().double()
    value = value.detach().double()
    return float(20 * torch.log10(reference.norm() / (reference - value).norm()))
