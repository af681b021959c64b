"""Is FP8 worth it? What a GEMM gains on tensor cores, and what quantizing its operands costs.

A GEMM's time is measured where it can be (`fp8fx.measure`); else it is predicted, as the larger of its arithmetic and its memory traffic.
The time to quantize is always a model's. Quantizing an operand reads it once for amax and once for the cast and writes a byte a value;
where a pointwise kernel computes the operand anyway, the cast replaces its store. An operand that several GEMMs read is quantized once,
and one that siblings share costs each its part. A frozen weight costs nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from fp8fx.config import GEMMS, Cast, Gemm, Recipe
from fp8fx.kernels.scaled_mm import ALIGNMENT, FEW

__all__ = ["MODEL", "Choice", "Linear", "Times", "choose", "possible", "should_merge"]

# Measured on one H100 80GB, torch 2.11.0+cu130, 2026-11-22, by benchmarks/train_step.py. What counts is their ratios, which
# other devices with FP8 tensor cores share within a third.
_FLOPS = {torch.float16: 700e12, torch.bfloat16: 700e12, torch.float32: 45e12}
_TF32_FLOPS = 350e12
_FP8_FLOPS = 1350e12
_BANDWIDTH = 2.8e12  # bytes a second that casts and reductions reach
_LAUNCHES = 12e-6  # seconds: the three small kernels of a quantization, launched and waited for
# Seconds of one more kernel of next to no work where nothing else is quantized than the input: benchmarks/gemm.py, 2026-11-24.
_LAUNCH = 1.5e-6
_MARGIN = 1.05  # FP8 has to be this much faster: what is known of the quantization is no better than that
_MEASURED_MARGIN = 1.02  # where nothing is quantized and the times are measured


@dataclass(frozen=True)
class Linear:
    """What the time of a linear's GEMMs depends on.

    Attributes:
        m, k, n: input (M, K), weight (N, K).
        dtype: the high-precision dtype it is computed in.
        gemms: the GEMMs that it computes at all: `forward`, and what autograd will ask for.
        siblings: how many linears read the same input, itself included.
        input_fused, grad_fused: whether a pointwise kernel, which a cast joins, computes the input and the output's gradient.
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
        gemm: seconds of one GEMM of a linear, by the GEMM's name and one of `measure.KINDS`, its operands at hand; None if not known.
        bandwidth: bytes a second that a quantization moves.
        measured: whether they were measured; else they are predicted.
    """

    gemm: Callable[[Linear, str, str], float | None]
    bandwidth: float = _BANDWIDTH
    measured: bool = True

    @property
    def margin(self) -> float:
        """How much faster an FP8 GEMM that quantizes nothing has to be."""
        return _MEASURED_MARGIN if self.measured else _MARGIN


@dataclass(frozen=True)
class Choice:
    """Which GEMMs to compute in FP8.

    Attributes:
        fp8: their names.
        speed: of every GEMM that could be, its time in high precision over that in FP8; empty where they were not weighed.
        weight_only: whether an input of a single row is best left as it is; only with a frozen weight, and `forward` in FP8.
        measured: whether the speeds were measured; else they are predicted.
    """

    fp8: tuple[str, ...]
    speed: Mapping[str, float] = field(default_factory=dict)
    weight_only: bool = False
    measured: bool = False

    @property
    def remark(self) -> str:
        """The speeds that decided: of the GEMMs in FP8, and of those that are not worth it; empty if nothing was weighed."""
        source = "measured" if self.measured else "predicted"
        fast, slow = ([f"{name} {x:.2f}x" for name, x in self.speed.items() if (name in self.fp8) == wanted] for wanted in (True, False))
        gained = f"{source}: {', '.join(fast)}" if fast else ""
        left = f"FP8 is not worth it, {source}: {', '.join(slow)}" if slow else ""
        return "; ".join(filter(None, (gained, left)))


def _predicted(linear: Linear, name: str, kind: str) -> float:
    """Seconds of one GEMM by the model; see `Times.gemm`."""
    m, k, n, size = linear.m, linear.k, linear.n, linear.dtype.itemsize
    weights = k * n * (linear.experts or 1)
    result = {"forward": m * n, "dgrad": m * k, "wgrad": weights}[name]
    operands = m * k + weights + m * n - result
    if kind == "weight_only":  # a row is bound by the weight
        return (m * k * size + k * n + result * size) / _BANDWIDTH
    fp8 = kind != "high"
    tf32 = linear.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    rate = _FP8_FLOPS if fp8 else _TF32_FLOPS if tf32 else _FLOPS[linear.dtype]
    return max(2 * m * k * n / rate, (operands * (1 if fp8 else size) + result * size) / _BANDWIDTH)


MODEL = Times(_predicted, measured=False)
"""The times of a model, for where nothing can be measured."""


def _quantization(linear: Linear, recipe: Recipe, fp8: frozenset[str], bandwidth: float) -> float:
    """Seconds of all the quantizations that these GEMMs need."""
    m, k, n, size = linear.m, linear.k, linear.n, linear.dtype.itemsize
    chosen = recipe.only(fp8)
    moved = launches = 0.0

    def cost(fused: bool, cast: Cast) -> int:
        # Bytes a value: read for amax, read for the cast, written. A row's second read comes from the cache, and a fused
        # cast writes one byte where the store would have written `size`.
        rows = not cast.transposes
        return size * (1 if rows else 2) + 1 - (size - 1 if fused and not rows else 0)

    def again(cast: Cast, shared: float) -> float:
        # wgrad's own layout: the same amax and a cast fused with another, or a scale a column, found by a pass of its own.
        return shared if cast.transposes else 2 * size + 1

    def launched(fused: bool, cast: Cast) -> float:
        # A cast, and what multiplies scales to the output or finds a tensor's amax, which takes two where there are many rows. With weights
        # quantized in every call it is counted as the rest of the step was.
        few = m <= FEW or (linear.frozen and not cast.transposes)
        if few or linear.frozen:
            return ((2 if few else 3) - fused) * _LAUNCH
        return _LAUNCHES

    forward, dgrad, wgrad = chosen.forward, chosen.dgrad, chosen.wgrad
    casts = [gemm.rhs for gemm in (forward, dgrad) if gemm]
    if linear.frozen:  # dgrad's layout is a copy, and so is what has to be padded
        copies = bool(dgrad) + bool(forward and (k % ALIGNMENT or n % ALIGNMENT))
        moved += copies * 2 * k * n
        launches += copies * _LAUNCH
    elif casts:
        amaxes = 1 if casts[0].transposes else 0
        moved += k * n * (linear.experts or 1) * (amaxes * size + len(casts) * (size + 1))  # a cast for each layout
        launches += _LAUNCHES
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


def possible(gemms: Iterable[str], recipe: Recipe, frozen: bool) -> tuple[str, ...]:
    """Which of a linear's GEMMs `recipe` can compute in FP8: with a frozen weight no wgrad, and dgrad only where its transpose serves."""
    names = set(gemms) & set(recipe.gemms)
    if frozen:
        forward, dgrad = recipe.forward, recipe.dgrad
        serves = forward is not None and dgrad is not None and forward.rhs == dgrad.rhs and dgrad.rhs.transposes
        names &= {"forward", "dgrad"} if serves else {"forward"}
    return tuple(name for name in GEMMS if name in names)


def _kind(gemm: Gemm) -> str:
    """As `measure` names it: a block is as long as a row."""
    return "tensor" if gemm.lhs.granularity == gemm.rhs.granularity == "tensor" else "row"


def _weight_only(linear: Linear, recipe: Recipe, times: Times) -> bool | None:
    """Whether a single row is multiplied faster as it is than quantized; None if its time in FP8 is not known."""
    if not linear.frozen or linear.experts or recipe.forward is None or not (linear.dynamic or linear.m == 1):
        return False
    row = replace(linear, m=1)
    quantized, exact = times.gemm(row, "forward", _kind(recipe.forward)), times.gemm(row, "forward", "weight_only")
    if quantized is None:
        return None
    return exact is not None and exact <= quantized + _quantization(row, recipe, frozenset({"forward"}), times.bandwidth)


def should_merge(linear: Linear, widths: Sequence[int], copied: int, recipe: Recipe, times: Times = MODEL) -> bool:
    """Whether frozen siblings of these N take less time as one GEMM, `linear`.

    Nothing but copies can cost more than it saves: one GEMM reads the input once, and fills the device no worse than several. `copied`
    columns of its result are copied to strides of their own, as outputs of the graph have to be.
    """
    if not copied or recipe.forward is None:
        return True
    gemms = [times.gemm(replace(linear, n=n), "forward", _kind(recipe.forward)) for n in (linear.n, *widths)]
    if None in gemms:
        return should_merge(linear, widths, copied, recipe)
    together, *apart = (seconds for seconds in gemms if seconds is not None)
    copies = 2 * linear.m * copied * linear.dtype.itemsize / times.bandwidth
    return together + copies <= sum(apart) + (len(widths) - 1) * _LAUNCH


def choose(linear: Linear, recipe: Recipe, times: Times = MODEL, always: bool = False) -> Choice:
    """The GEMMs of `linear` that are worth FP8 under `recipe`: the set that takes the least time altogether.

    Args:
        linear: what is computed, and where.
        recipe: the GEMMs that can be FP8, and how.
        times: of the GEMMs; where one that is needed is not known, MODEL's are used for all.
        always: take every GEMM that can be FP8, and ask only how a frozen weight is best multiplied with a single row.
    """
    names = possible(linear.gemms, recipe, linear.frozen)
    weight_only = _weight_only(linear, recipe, times) if "forward" in names else False
    if weight_only is None:
        return choose(linear, recipe, MODEL, always)
    if always:
        return Choice(names, weight_only=weight_only, measured=times.measured)
    as_it_is = weight_only and linear.m == 1
    high, low, margin = dict[str, float](), dict[str, float](), dict[str, float]()
    for name in names:
        unquantized = as_it_is and name == "forward"
        exact = times.gemm(linear, name, "high")
        fp8 = times.gemm(linear, name, "weight_only" if unquantized else _kind(getattr(recipe, name)))
        if exact is None or fp8 is None:
            return choose(linear, recipe, MODEL)
        high[name], low[name], margin[name] = exact, fp8, times.margin if unquantized else _MARGIN
    restored = 0.0  # seconds: dgrad in high precision needs the values of a frozen weight
    if linear.frozen and "dgrad" in linear.gemms:
        restored = linear.k * linear.n * (1 + linear.dtype.itemsize) / times.bandwidth + _LAUNCH

    def quantization(fp8: Iterable[str]) -> float:
        quantized = frozenset(fp8) - ({"forward"} if as_it_is else set())
        return _quantization(linear, recipe, quantized, times.bandwidth) if quantized else 0.0

    def gain(fp8: tuple[str, ...]) -> float:
        gained = sum(high[name] - margin[name] * low[name] for name in fp8) - _MARGIN * quantization(fp8)
        return gained - (restored if fp8 and "dgrad" not in fp8 else 0.0)

    sets = itertools.chain.from_iterable(itertools.combinations(names, count) for count in range(len(names) + 1))
    best = max((fp8 for fp8 in sets if not (linear.frozen and fp8) or "forward" in fp8), key=gain)
    speed = {}
    for name in names:
        others = set(best) - {name}
        speed[name] = high[name] / (low[name] + quantization({*others, name}) - quantization(others))
    return Choice(best, speed, weight_only and "forward" in best, times.measured)
