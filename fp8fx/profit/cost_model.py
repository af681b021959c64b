"""The time of a linear's GEMMs and quantizations on tensor cores, predicted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fp8fx.executors.scaled_mm import ALIGNMENT, MAX_ROWS_SCALED_AFTER
from fp8fx.recipes.recipe import GEMMS, Cast, Recipe

__all__ = ["KERNEL_SECONDS", "MODEL", "REQUIRED_GAIN", "Linear", "Times", "quantization_seconds"]

# Measured on one H100 80GB, torch 2.11.0+cu130, 2026-11-22, by benchmarks/train_step.py. What counts is their ratios,
# which other devices with FP8 tensor cores share within a third.
_FLOPS = {torch.float16: 700e12, torch.bfloat16: 700e12, torch.float32: 45e12}


_TF32_FLOPS = 350e12


_FP8_FLOPS = 1350e12


_BANDWIDTH = 2.8e12  # bytes a second that casts and reductions reach


_QUANTIZATION_KERNELS_SECONDS = 12e-6  # the three small kernels of a quantization, launched and waited for


KERNEL_SECONDS = 1.5e-6
"""Of one more kernel of next to no work, if nothing but the input is quantized: benchmarks/gemm.py, 2026-11-24."""


REQUIRED_GAIN = 1.05
"""FP8 has to be this much faster: what is known of the quantization is no more exact."""


_REQUIRED_GAIN_UNQUANTIZED = 1.02  # if nothing is quantized and the times are measured


@dataclass(frozen=True)
class Linear:
    """What the time of a linear's GEMMs depends on.

    Attributes:
        m, k, n: input (M, K), weight (N, K).
        dtype: the high-precision dtype that it is computed in.
        gemms: the GEMMs that it computes at all: `forward`, and what autograd will ask for.
        siblings: how many linears read the same input, itself included.
        input_fused: whether a pointwise kernel, which a cast joins, computes the input.
        grad_fused: the same of the output's gradient.
        frozen: whether the weight is quantized beforehand.
        dynamic: whether M is but one of several that it will be called with.
        experts: of a grouped matmul, how many weights share the rows; 0 for any other.
    """

    m: int
    k: int
    n: int
    dtype: torch.dtype
    gemms: tuple[str, ...] = GEMMS
    siblings: int = 1
    input_fused: bool = False
    grad_fused: bool = False
    frozen: bool = False
    dynamic: bool = False
    experts: int = 0


@dataclass(frozen=True)
class Times:
    """Where the times come from.

    Attributes:
        gemm: seconds of one GEMM of a linear, by the GEMM's name and one of `measure.KINDS`, its operands at hand; None
            if not known.
        bandwidth: bytes a second that a quantization moves.
        measured: whether they were measured; otherwise they are predicted.
    """

    gemm: Callable[[Linear, str, str], float | None]
    bandwidth: float = _BANDWIDTH
    measured: bool = True

    @property
    def required_gain(self) -> float:
        """How much faster an FP8 GEMM that quantizes nothing has to be."""
        return _REQUIRED_GAIN_UNQUANTIZED if self.measured else REQUIRED_GAIN


def _predicted(linear: Linear, name: str, kind: str) -> float:
    """Seconds of one GEMM by the model; see `Times.gemm`."""
    m, k, n = linear.m, linear.k, linear.n
    size = linear.dtype.itemsize
    weights = k * n * (linear.experts or 1)
    result = {"forward": m * n, "dgrad": m * k, "wgrad": weights}[name]
    operands = m * k + weights + m * n - result
    if kind == "weight_only":  # a row is bound by the weight
        return (m * k * size + k * n + result * size) / _BANDWIDTH
    is_fp8 = kind != "high"
    is_tf32 = linear.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    flops = _FP8_FLOPS if is_fp8 else _TF32_FLOPS if is_tf32 else _FLOPS[linear.dtype]
    return max(2 * m * k * n / flops, (operands * (1 if is_fp8 else size) + result * size) / _BANDWIDTH)


MODEL = Times(_predicted, measured=False)
"""The times of a model, for devices on which nothing can be measured."""


def quantization_seconds(linear: Linear, recipe: Recipe, fp8: frozenset[str], bandwidth: float) -> float:
    """Seconds of all the quantizations that these GEMMs need."""
    m, k, n = linear.m, linear.k, linear.n
    size = linear.dtype.itemsize
    chosen = recipe.only(fp8)
    moved = launches = 0.0  # bytes, seconds

    def cost(is_fused: bool, cast: Cast) -> int:
        # Bytes a value: read for amax, read for the cast, written. A row's second read comes from the cache. A fused
        # cast writes one byte instead of the `size` that the store would have written.
        by_rows = not cast.transposes
        return size * (1 if by_rows else 2) + 1 - (size - 1 if is_fused and not by_rows else 0)

    def again(cast: Cast, shared: float) -> float:
        # Bytes a value in wgrad's own layout: the same amax and a cast fused with another, or a scale a column, found
        # by a pass of its own.
        return shared if cast.transposes else 2 * size + 1

    def launched(is_fused: bool, cast: Cast) -> float:
        # A cast, and what multiplies scales to the output or finds a tensor's amax, which takes two kernels if there
        # are many rows. With weights quantized in every call it is counted as the rest of the step was.
        has_few_rows = m <= MAX_ROWS_SCALED_AFTER or (linear.frozen and not cast.transposes)
        if has_few_rows or linear.frozen:
            return ((2 if has_few_rows else 3) - is_fused) * KERNEL_SECONDS
        return _QUANTIZATION_KERNELS_SECONDS

    forward, dgrad, wgrad = chosen.forward, chosen.dgrad, chosen.wgrad
    casts = [gemm.rhs for gemm in (forward, dgrad) if gemm]
    if linear.frozen:  # dgrad's layout is a copy, and so is what has to be padded
        copies = bool(dgrad) + bool(forward and (k % ALIGNMENT or n % ALIGNMENT))
        moved += copies * 2 * k * n
        launches += copies * KERNEL_SECONDS
    elif casts:
        amaxes = 1 if casts[0].transposes else 0
        moved += k * n * (linear.experts or 1) * (amaxes * size + len(casts) * (size + 1))  # a cast for each layout
        launches += _QUANTIZATION_KERNELS_SECONDS
    if forward or wgrad:
        first = forward or wgrad
        assert first is not None
        moved += m * k * cost(linear.input_fused, first.lhs) / linear.siblings
        if forward and wgrad:
            moved += m * k * again(wgrad.lhs, 1 + size / 2) / linear.siblings  # cast again in backward
        launches += launched(linear.input_fused, first.lhs) / linear.siblings
    if dgrad or wgrad:
        cast = dgrad.lhs if dgrad else wgrad.rhs if wgrad else None
        assert cast is not None
        moved += m * n * cost(linear.grad_fused, cast)
        if dgrad and wgrad:
            moved += m * n * again(wgrad.rhs, 1)
        launches += launched(linear.grad_fused, cast)
    return moved / bandwidth + launches
