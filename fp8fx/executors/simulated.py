"""The values of real FP8 without its speed: dequantize, then multiply in the input's dtype. Runs everywhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8fx.executors.executor import Executor
from fp8fx.recipes.quantize import Quantized, dequantize

__all__ = ["Simulated"]


class Simulated(Executor):
    """Multiplies the dequantized values in high precision, on every device."""

    name = "simulated"
    tensor_cores = False
    keeps_fp8_weights = True

    def matmul(
        self,
        lhs: Quantized,
        rhs: Quantized,
        *,
        block: int,
        dtype: torch.dtype,
        bias: Tensor | None = None,
        fast: bool = False,
        never_recomputed: bool = False,
    ) -> Tensor:
        """As `Executor.matmul`; `fast` and `never_recomputed` have no meaning here."""
        out = dequantize(lhs, block, dtype) @ dequantize(rhs, block, dtype).t()
        return out if bias is None else out + bias

    def grouped_matmul(self, lhs: Quantized, rhs: Quantized, offs: Tensor, *, dtype: torch.dtype) -> Tensor:
        """As `Executor.grouped_matmul`; a `rhs` without a scale holds values of `dtype`."""
        scale = None if rhs.scale is None else rhs.scale.unsqueeze(-1)
        weights = rhs.data if scale is None else rhs.data.float() * scale
        out: Tensor = F.grouped_mm(dequantize(lhs, -1, dtype), weights.to(dtype).transpose(-2, -1), offs=offs)
        return out
