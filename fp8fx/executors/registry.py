"""One file an executor. Each has the same three functions:

quantize(x, cast, block, scale) -> Quantized                x (rows, features), the contracted dimension last
matmul(lhs, rhs, block, dtype, bias, fast, once) -> Tensor  lhs @ rhs.T + bias, (rows of lhs, rows of rhs), in `dtype`
grouped_matmul(lhs, rhs, offs, dtype) -> Tensor             rows of lhs up to offs[0] @ rhs[0].T, from there to offs[1] @ rhs[1].T, ...
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor

from fp8fx.executors import bitsandbytes, scaled_mm, simulated
from fp8fx.recipes.quantize import Quantized
from fp8fx.recipes.recipe import Cast

__all__ = ["Executor", "get"]


class Executor(Protocol):
    """What a file of this folder offers."""

    def quantize(self, x: Tensor, cast: Cast, block: int, scale: Tensor | None = None) -> Quantized:
        """Quantizes `x` (rows, features), with `scale` where it is known from the same values in another layout."""

    def matmul(
        self,
        lhs: Quantized,
        rhs: Quantized,
        *,
        block: int,
        dtype: torch.dtype,
        bias: Tensor | None = None,
        fast: bool = False,
        once: bool = False,
    ) -> Tensor:
        """`lhs @ rhs.T + bias` in `dtype`; a `lhs` without a scale holds values of that dtype, not FP8.

        `fast` allows the tensor cores' faster, coarser accumulation. `once` says that no later kernel computes the same product again and
        relies on the same bits.
        """

    def grouped_matmul(self, lhs: Quantized, rhs: Quantized, offs: Tensor, *, dtype: torch.dtype) -> Tensor:
        """(M, K) with a scale per row, (E, N, K) with a scale (E, N), offs (E,) int32 -> (M, N) in `dtype`, bfloat16."""


_EXECUTORS = {"scaled_mm": scaled_mm, "simulated": simulated, "bitsandbytes": bitsandbytes}


def get(name: str) -> Executor:
    """The executor of that name, as `hardware.resolve` gives it."""
    return cast(Executor, _EXECUTORS[name])
