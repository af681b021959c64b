"""Is FP8 worth it? What a GEMM gains on tensor cores, and what quantizing its operands costs.

A GEMM's time is measured if it can be (`profit.measure`). Otherwise it is predicted, as the larger of its arithmetic
and its memory traffic. The time to quantize is always a model's. Quantizing an operand reads it once for amax and once
for the cast, and writes a byte a value. If a pointwise kernel computes the operand anyway, the cast replaces its store.
An operand that several GEMMs read is quantized once, and one that siblings share costs each its part. A frozen weight
costs nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fp8fx.profit.cost_model import KERNEL_SECONDS, MODEL, REQUIRED_GAIN, Linear, Times, quantization_seconds
from fp8fx.reasons import Because, Remark, WorthReason
from fp8fx.recipes.recipe import GEMMS, Gemm, Recipe

__all__ = ["Choice", "choose", "possible", "should_merge"]


@dataclass(frozen=True)
class Choice:
    """Which GEMMs to compute in FP8.

    Attributes:
        fp8: their names.
        speed: of every GEMM that could be, its time in high precision over that in FP8; empty if they were not weighed.
        weight_only: whether an input of a single row is best left as it is; only with a frozen weight, and `forward` in
            FP8.
        measured: whether the speeds were measured; otherwise they are predicted.
    """

    fp8: tuple[str, ...]
    speed: Mapping[str, float] = field(default_factory=dict)
    weight_only: bool = False
    measured: bool = False

    @property
    def _source(self) -> str:
        return "measured" if self.measured else "predicted"

    def _speeds(self, *, in_fp8: bool) -> str:
        return ", ".join(f"{name} {speed:.2f}x" for name, speed in self.speed.items() if (name in self.fp8) == in_fp8)

    @property
    def remarks(self) -> tuple[Because, ...]:
        """The speeds that decided, of the GEMMs in FP8 and of those that are not worth it.

        There are none if nothing was weighed.
        """
        gained = self._speeds(in_fp8=True)
        lost = self._speeds(in_fp8=False)
        faster = (Remark.FASTER(source=self._source, speeds=gained),) if gained else ()
        slower = (Remark.SLOWER(source=self._source, speeds=lost),) if lost else ()
        return (*faster, *slower)

    def why_left(self, m: int | None) -> Because:
        """Why no GEMM of a linear with M rows is worth it."""
        return WorthReason.SLOWER(source=self._source, speeds=self._speeds(in_fp8=False), m=m)


def possible(gemms: Iterable[str], recipe: Recipe, frozen: bool) -> tuple[str, ...]:
    """Which of a linear's GEMMs `recipe` can compute in FP8.

    With a frozen weight these are not wgrad, and dgrad only if the weight's transpose serves.
    """
    names = set(gemms) & set(recipe.gemms)
    if frozen:
        forward, dgrad = recipe.forward, recipe.dgrad
        serves = forward is not None and dgrad is not None and forward.rhs == dgrad.rhs and dgrad.rhs.transposes
        names &= {"forward", "dgrad"} if serves else {"forward"}
    return tuple(name for name in GEMMS if name in names)


def _kind(gemm: Gemm) -> str:
    """As `measure` names it: a block is as long as a row."""
    return "tensor" if gemm.lhs.granularity == gemm.rhs.granularity == "tensor" else "row"


def _is_weight_only(linear: Linear, recipe: Recipe, times: Times) -> bool | None:
    """Whether a single row is multiplied faster as it is than quantized; None if its time in FP8 is not known."""
    if not linear.frozen or linear.experts or recipe.forward is None or not (linear.dynamic or linear.m == 1):
        return False
    row = replace(linear, m=1)
    quantized = times.gemm(row, "forward", _kind(recipe.forward))
    exact = times.gemm(row, "forward", "weight_only")
    if quantized is None:
        return None
    quantization = quantization_seconds(row, recipe, frozenset({"forward"}), times.bandwidth)
    return exact is not None and exact <= quantized + quantization


def should_merge(
    linear: Linear, widths: Sequence[int], columns_to_copy: int, recipe: Recipe, times: Times = MODEL
) -> bool:
    """Whether frozen siblings take less time as one GEMM.

    Nothing but copies can cost more than it saves: one GEMM reads the input once, and fills the device no worse than
    several.

    Args:
        linear: the one GEMM.
        widths: N of each sibling.
        columns_to_copy: how many columns of the result are copied to strides of their own, as a graph's outputs have
            to be.
        recipe: which GEMMs can be FP8, and how.
        times: of the GEMMs; if one that is needed is not known, MODEL's are used for all.
    """
    if not columns_to_copy or recipe.forward is None:
        return True
    gemms = [times.gemm(replace(linear, n=n), "forward", _kind(recipe.forward)) for n in (linear.n, *widths)]
    if None in gemms:
        return should_merge(linear, widths, columns_to_copy, recipe)
    together, *apart = (seconds for seconds in gemms if seconds is not None)
    copies = 2 * linear.m * columns_to_copy * linear.dtype.itemsize / times.bandwidth
    return together + copies <= sum(apart) + (len(widths) - 1) * KERNEL_SECONDS


def choose(linear: Linear, recipe: Recipe, times: Times = MODEL, always: bool = False) -> Choice:
    """The GEMMs of `linear` that are worth FP8 under `recipe`: the set that takes the least time altogether.

    Args:
        linear: what is computed.
        recipe: the GEMMs that can be FP8, and how.
        times: of the GEMMs; if one that is needed is not known, MODEL's are used for all.
        always: take every GEMM that can be FP8, and ask only how a frozen weight is best multiplied with a single row.
    """
    names = possible(linear.gemms, recipe, linear.frozen)
    weight_only = _is_weight_only(linear, recipe, times) if "forward" in names else False
    if weight_only is None:
        return choose(linear, recipe, MODEL, always)
    if always:
        return Choice(names, weight_only=weight_only, measured=times.measured)
    row_as_it_is = weight_only and linear.m == 1
    high: dict[str, float] = {}
    low: dict[str, float] = {}
    required_gain: dict[str, float] = {}
    for name in names:
        is_unquantized = row_as_it_is and name == "forward"
        exact = times.gemm(linear, name, "high")
        fp8 = times.gemm(linear, name, "weight_only" if is_unquantized else _kind(getattr(recipe, name)))
        if exact is None or fp8 is None:
            return choose(linear, recipe, MODEL)
        high[name] = exact
        low[name] = fp8
        required_gain[name] = times.required_gain if is_unquantized else REQUIRED_GAIN
    restored = 0.0  # seconds: dgrad in high precision needs the values of a frozen weight
    if linear.frozen and "dgrad" in linear.gemms:
        restored = linear.k * linear.n * (1 + linear.dtype.itemsize) / times.bandwidth + KERNEL_SECONDS

    def quantization(fp8: Iterable[str]) -> float:
        quantized = frozenset(fp8) - ({"forward"} if row_as_it_is else set())
        return quantization_seconds(linear, recipe, quantized, times.bandwidth) if quantized else 0.0

    def gain(fp8: tuple[str, ...]) -> float:
        gained = sum(high[name] - required_gain[name] * low[name] for name in fp8) - REQUIRED_GAIN * quantization(fp8)
        return gained - (restored if fp8 and "dgrad" not in fp8 else 0.0)

    subsets = itertools.chain.from_iterable(itertools.combinations(names, count) for count in range(len(names) + 1))
    best = max((fp8 for fp8 in subsets if not (linear.frozen and fp8) or "forward" in fp8), key=gain)
    speed = {}
    for name in names:
        others = set(best) - {name}
        speed[name] = high[name] / (low[name] + quantization({*others, name}) - quantization(others))
    return Choice(best, speed, weight_only and "forward" in best, times.measured)
