"""The contract of an executor: what quantizes operands and multiplies them, and what it can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from fp8fx.recipes import quantize as arithmetic
from fp8fx.recipes.quantize import Quantized
from fp8fx.recipes.recipe import Cast

__all__ = ["Executor"]


class Executor(ABC):
    """One way to compute an FP8 matmul. It has no state; `registry.EXECUTORS` holds one of each.

    Attributes:
        name: what the user calls it, as in `options={"executor": name}`.
        tensor_cores: whether its products run on FP8 tensor cores, so that FP8 can be faster than high precision.
        keeps_fp8_weights: whether it multiplies FP8 values, so that a weight can be quantized once and kept.
        distributions: the packages besides torch that it needs, by their names on PyPI.
    """

    name: ClassVar[str]
    tensor_cores: ClassVar[bool]
    keeps_fp8_weights: ClassVar[bool]
    distributions: ClassVar[tuple[str, ...]] = ()

    def why_unavailable(self, device: torch.device) -> str | None:
        """Why it cannot run on `device`, such as "needs a CUDA device, found device cpu"; None if it can."""
        return None

    def why_no_groups(self, device: torch.device) -> str | None:
        """Why it cannot multiply groups on a `device` that it runs on, in the same form; None if it can."""
        return None

    def available(self, device: torch.device) -> bool:
        """Whether it runs on `device`."""
        return self.why_unavailable(device) is None

    def groups(self, device: torch.device) -> bool:
        """Whether `grouped_matmul` runs on `device`."""
        return self.available(device) and self.why_no_groups(device) is None

    def is_automatic(self, device: torch.device) -> bool:
        """Whether `auto` may choose it for `device`; if several may, the registry's order decides."""
        return self.available(device)

    def prepare(self) -> None:  # noqa: B027 - nothing to import by default
        """Imports what its products need. It runs each time that the executor is resolved."""

    def quantize(self, x: Tensor, cast: Cast, block: int, scale: Tensor | None = None) -> Quantized:
        """Quantizes `x` (rows, features) as `cast` says, in blocks of `block` features.

        The contracted dimension is the last. `scale` is that of the same values in another layout, if one has it.
        """
        return arithmetic.quantize(x, cast, block, scale)

    @abstractmethod
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
        """`lhs @ rhs.T + bias`: (M, K), (N, K), (N,) -> (M, N) in `dtype`; M, K and N of any size.

        Args:
            lhs: as `quantize` gives it. If it has no scale, its values are of `dtype`, not FP8.
            rhs: as `quantize` gives it, with one scale, or one a row (N, 1).
            block: the block size that `lhs` was quantized with.
            dtype: float32, float16 or bfloat16.
            bias: of `dtype`.
            fast: allows the tensor cores' faster, coarser accumulation.
            never_recomputed: no later kernel computes the same product again and relies on the same bits.
        """

    @abstractmethod
    def grouped_matmul(self, lhs: Quantized, rhs: Quantized, offs: Tensor, *, dtype: torch.dtype) -> Tensor:
        """Each group of `lhs`'s rows times its own weight, transposed: (M, K), (E, N, K) -> (M, N) in `dtype`.

        Rows of `lhs` up to offs[0] are multiplied with rhs[0].T, from there up to offs[1] with rhs[1].T, and so on.

        Args:
            lhs: as `quantize` gives it, with a scale a row (M, 1).
            rhs: the weights, with a scale a row of each (E, N).
            offs: (E,), int32.
            dtype: bfloat16. K and N are multiples of 16.
        """
