"""The values of real FP8 without its speed: dequantize, then multiply in the input's dtype. Runs everywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from fp8fx.numerics import Quantized, dequantize, quantize

__all__ = ["matmul", "quantize"]


def matmul(lhs: Quantized, rhs: Quantized, *, block: int, dtype: torch.dtype, bias: Tensor | None = None, fast: bool = False) -> Tensor:
    """`lhs @ rhs.T + bias` in `dtype`: (M, K), (N, K) -> (M, N). `fast` has no meaning here."""
    out = dequantize(lhs, block, dtype) @ dequantize(rhs, block, dtype).t()
    return out if bias is None else out + bias
