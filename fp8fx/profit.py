"""Is FP8 worth it? A model of the time on tensor cores: what a GEMM gains there, and what quantizing its operands costs.

A GEMM takes the larger of its arithmetic and its memory traffic. Quantizing an operand reads it once for amax and once for
the cast and writes a byte a value; where a pointwise kernel computes the operand anyway, the cast replaces its store. An
operand that several GEMMs read is quantized once, and one that siblings share costs each its part.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from fp8fx.config import GEMMS, Cast, Recipe

__all__ = ["Choice", "Linear", "choose"]

# Measured on one H100 80GB, torch 2.11.0+cu130, 2026-11-22, by benchmarks/train_step.py. What counts is their ratios, which
# other devices with FP8 tensor cores share within a third.
_FLOPS = {torch.float16: 700e12, torch.bfloat16: 700e12, torch.float32: 45e12}
_TF32_FLOPS = 350e12
_FP8_FLOPS = 1350e12
_BANDWIDTH = 2.8e12  # bytes a second that casts and reductions reach
_LAUNCHES = 12e-6  # seconds: the three small kernels of a quantization, launched and waited for
_MARGIN = 1.05  # FP8 has to be predicted this much faster: the model is no better than that


@dataclass(frozen=True)
class Linear:
    """What the time of a linear's GEMMs depends on.

    Attributes:
        m, k, n: input (M, K), weight (N, K).
        dtype: the high-precision dtype it is computed in.
        gemms: the GEMMs that it computes at all: `forward`, and what autograd will ask for.
        siblings: how many linears read the same input, itself included.
        input_fused, grad_fused: whether a pointwise kernel, which a cast joins, computes the input and the output's gradient.
    """

    m: int
    k: int
    n: int
    dtype: torch.dtype
    gemms: tuple[str, ...] = GEMMS
    siblings: int = 1
    input_fused: bool = False
    grad_fused: bool = False


@dataclass(frozen=True)
class Choice:
    """Which GEMMs to compute in FP8.

    Attributes:
        fp8: their names.
        speed: of every GEMM that could be, its predicted time in high precision over that in FP8.
    """

    fp8: tuple[str, ...]
    speed: Mapping[str, float] = field(default_factory=dict)

    @property
    def remark(self) -> str:
        """The GEMMs that could be and are not worth it, with their predicted speed; empty if there is none."""
        slow = [f"{name} {speed:.2f}x" for name, speed in self.speed.items() if name not in self.fp8]
        return f"FP8 is not worth it, predicted: {', '.join(slow)}" if slow else ""


def _gemm(linear: Linear, name: str, fp8: bool) -> float:
    """Seconds of one GEMM, its operands at hand."""
    m, k, n, size = linear.m, linear.k, linear.n, linear.dtype.itemsize
    tf32 = linear.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    rate = _FP8_FLOPS if fp8 else _TF32_FLOPS if tf32 else _FLOPS[linear.dtype]
    result = {"forward": m * n, "dgrad": m * k, "wgrad": k * n}[name]
    operands = m * k + k * n + m * n - result
    return max(2 * m * k * n / rate, (operands * (1 if fp8 else size) + result * size) / _BANDWIDTH)


def _quantization(linear: Linear, recipe: Recipe, fp8: frozenset[str]) -> float:
    """Seconds of all the quantizations that these GEMMs need."""
    m, k, n, size = linear.m, linear.k, linear.n, linear.dtype.itemsize
    chosen = recipe.only(fp8)
    moved = quantized = 0.0

    def cost(fused: bool, cast: Cast) -> int:
        # Bytes a value: read for amax, read for the cast, written. A row's second read comes from the cache, and a fused
        # cast writes one byte where the store would have written `size`.
        rows = not cast.transposes
        return size * (1 if rows else 2) + 1 - (size - 1 if fused and not rows else 0)

    def again(cast: Cast, shared: float) -> float:
        # wgrad's own layout: the same amax and a cast fused with another, or a scale a column, found by a pass of its own.
        return shared if cast.transposes else 2 * size + 1

    forward, dgrad, wgrad = chosen.forward, chosen.dgrad, chosen.wgrad
    casts = [gemm.rhs for gemm in (forward, dgrad) if gemm]
    if casts:
        amaxes = 1 if casts[0].transposes else 0
        moved += k * n * (amaxes * size + len(casts) * (size + 1))  # a cast for each layout
        quantized += 1
    if forward or wgrad:
        first = forward or wgrad
        assert first is not None
        moved += m * k * cost(linear.input_fused, first.lhs) / linear.siblings
        if forward and wgrad:
            moved += m * k * again(wgrad.lhs, 1 + size / 2) / linear.siblings  # cast again in backward
        quantized += 1 / linear.siblings
    if dgrad or wgrad:
        cast = dgrad.lhs if dgrad else wgrad.rhs if wgrad else None
        assert cast is not None
        moved += m * n * cost(linear.grad_fused, cast)
        if dgrad and wgrad:
            moved += m * n * again(wgrad.rhs, 1)
        quantized += 1
    return moved / _BANDWIDTH + quantized * _LAUNCHES


def choose(linear: Linear, recipe: Recipe) -> Choice:
    """The GEMMs of `linear` that are worth FP8 under `recipe`: the set that takes the least time altogether."""
    possible = [name for name in recipe.gemms if name in linear.gemms]
    exact = {name: _gemm(linear, name, fp8=False) for name in possible}

    def seconds(fp8: Iterable[str]) -> float:
        names = frozenset(fp8)
        return sum(_gemm(linear, name, fp8=True) for name in names) + _quantization(linear, recipe, names) if names else 0.0

    def gain(fp8: tuple[str, ...]) -> float:
        return sum(exact[name] for name in fp8) - _MARGIN * seconds(fp8)

    sets = itertools.chain.from_iterable(itertools.combinations(possible, count) for count in range(len(possible) + 1))
    best = max(sets, key=gain)
    speed = {}
    for name in possible:
        others = set(best) - {name}
        speed[name] = exact[name] / (seconds({*others, name}) - seconds(others))
    return Choice(best, speed)
