"""The values of real FP8 without its speed: dequantize, then multiply in the input's dtype. Runs everywhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8fx.recipes.quantize import Quantized, dequantize, quantize

__all__ = ["grouped_matmul", "matmul", "quantize"]


def matmul(
    lhs: Quantized,
    rhs: Quantized,
    *,
    block: int,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    fast: bool = False,
    once: bool = False,
) -> Tensor:
    """`lhs @ rhs.T + bias` in `dtype`: (M, K), (N, K) -> (M, N). `fast` and `once` have no meaning here."""
    out = dequantize(lhs, block, dtype) @ dequantize(rhs, block, dtype).t()
    return out if bias is None else out + bias


def grouped_matmul(lhs: Quantized, rhs: Quantized, offs: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Rows of `lhs` (M, K), by groups that end at `offs` (E,), times `rhs` (E, N, K) transposed -> (M, N) in `dtype`."""
    scale = None if rhs.scale is None else rhs.scale.unsqueeze(-1)
    weights = rhs.data if scale is None else rhs.data.float() * scale
    out: Tensor = F.grouped_mm(dequantize(lhs, -1, dtype), weights.to(dtype).transpose(-2, -1), offs=offs)
    return out
