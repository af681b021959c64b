"""einsum, tensordot, inner and a weight on the left, as views around `input (*, K) @ weight (K, N)`."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8fx.linears.views import View, Views, permute
from fp8fx.reasons import Because, CallReason, WeightReason

__all__ = ["Contraction", "einsum", "tensordot"]

Size = int | torch.SymInt


@dataclass(frozen=True)
class Contraction:
    """A sum over products of two operands' values, a label a dimension.

    Attributes:
        operands: the labels of each.
        result: the labels of the result.
    """

    operands: tuple[tuple[str, ...], tuple[str, ...]]
    result: tuple[str, ...]

    @property
    def contracts(self) -> bool:
        """Whether anything that both operands have is summed."""
        return bool(set(self.operands[0]) & set(self.operands[1]) - set(self.result))

    def sizes(self, tensors: Sequence[Tensor]) -> tuple[Size, Size, Size]:
        """M, K and N of the matmul, a batch counted in M."""
        of = {
            label: size
            for labels, x in zip(self.operands, tensors, strict=True)
            for label, size in zip(labels, x.shape, strict=True)
        }
        second = set(self.operands[1])
        k = [label for label in second if label in self.operands[0] and label not in self.result]
        n = [label for label in second if label not in self.operands[0]]
        m = of.keys() - k - set(n)
        return (
            math.prod(of[label] for label in m),
            math.prod(of[label] for label in k),
            math.prod(of[label] for label in n),
        )

    def views(self, tensors: Sequence[Tensor], at: int) -> Views | Because:
        """What makes it a matmul with a weight, the operand at that place; or why it is none."""
        x, weight = self.operands[1 - at], self.operands[at]
        sizes = dict(zip(weight, tensors[at].shape, strict=True))
        shared = [label for label in weight if label in x]
        free, rows = [label for label in weight if label not in x], [label for label in x if label not in weight]
        if len(set(x)) < len(x) or len(set(weight)) < len(weight):
            return CallReason.DIAGONAL()
        if any(tensors[1 - at].shape[x.index(label)] != sizes[label] for label in shared):
            return CallReason.BROADCAST()
        if not shared:
            return CallReason.NOTHING_CONTRACTED()
        if any(label in self.result for label in shared):
            return WeightReason.BATCHED()
        if set(free) | set(rows) != set(self.result):
            return CallReason.SUMMED_ALONE()
        if all(sizes[label] == 1 for label in shared):  # torch multiplies it pointwise, which autocast does not cast
            return CallReason.CONTRACTS_ONE()
        broadcast = [x.index(label) for label in shared if sizes[label] == 1]
        of_input: tuple[View, ...] = (
            (("sum", broadcast, True),) if broadcast else ()
        )  # another input may have more there
        of_input += permute([x.index(label) for label in (*rows, *shared)])
        of_input += (
            ("expand", *(-1 for _ in rows), *(sizes[label] for label in shared)),
        )  # an input of size 1 there is broadcast
        of_weight = permute([weight.index(label) for label in (*shared, *free)])
        of_result: tuple[View, ...] = ()
        if len(shared) > 1:
            of_input += (("flatten", -len(shared)),)
            of_weight += (("flatten", 0, len(shared) - 1),)
        if not free:
            of_weight += (("unsqueeze", -1),)
            of_result += (("squeeze", -1),)
        elif len(free) > 1:
            of_weight += (("flatten", 1),)
            of_result += (("unflatten", -1, tuple(sizes[label] for label in free)),)
        made = [*rows, *free]
        return Views(of_input, of_weight, of_result + permute([made.index(label) for label in self.result]))


def _labels(term: str, dims: int) -> tuple[str, ...]:
    before, dots, after = term.partition("...")
    count = dims - len(before) - len(after)
    if count < 0 or (count and not dots):
        raise ValueError(f"{term!r} does not name {dims} dimensions")
    return (
        *before,
        *(f".{i}" for i in reversed(range(count))),
        *after,
    )  # the ellipsis counted from the right, as it broadcasts


def einsum(equation: str, dims: Sequence[int]) -> Contraction:
    """Of torch.einsum's equation for two operands of so many dimensions.

    Raises:
        ValueError: it does not fit them.
    """
    terms, arrow, wanted = equation.replace(" ", "").partition("->")
    first, second = (_labels(term, count) for term, count in zip(terms.split(","), dims, strict=True))
    every = {*first, *second}
    dots = sorted((label for label in every if label.startswith(".")), key=lambda label: -int(label[1:]))
    if arrow:
        before, mark, after = wanted.partition("...")
        return Contraction((first, second), (*before, *(dots if mark else ()), *after))
    once = sorted(label for label in every if label in string.ascii_letters and (*first, *second).count(label) == 1)
    return Contraction((first, second), (*dots, *sorted(once)))


def tensordot(contracted: int | Sequence[Sequence[int]], dims: Sequence[int]) -> Contraction:
    """Of torch.tensordot's dimensions for two operands of so many."""
    if isinstance(contracted, int):
        contracted = range(dims[0] - contracted, dims[0]), range(contracted)
    first, second = ([f"{side}{i}" for i in range(count)] for side, count in zip("ab", dims, strict=True))
    for a, b in zip(*contracted, strict=True):
        second[b] = first[a]
    shared = set(first) & set(second)
    return Contraction(
        (tuple(first), tuple(second)), tuple(label for label in (*first, *second) if label not in shared)
    )
