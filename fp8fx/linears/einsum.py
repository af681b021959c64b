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
        size_of: dict[str, Size] = {}
        for labels, x in zip(self.operands, tensors, strict=True):
            size_of |= zip(labels, x.shape, strict=True)
        first, second = map(set, self.operands)
        k = (second & first) - set(self.result)
        n = second - first
        m = size_of.keys() - k - n
        return (
            math.prod(size_of[label] for label in m),
            math.prod(size_of[label] for label in k),
            math.prod(size_of[label] for label in n),
        )

    def views(self, tensors: Sequence[Tensor], place: int) -> Views | Because:
        """What makes it a matmul with a weight, the operand at that place; or why it is none."""
        why = self._why_no_matmul(tensors, place)
        if why is not None:
            return why
        x = self.operands[1 - place]
        weight = self.operands[place]
        sizes = dict(zip(weight, tensors[place].shape, strict=True))
        shared = [label for label in weight if label in x]
        free = [label for label in weight if label not in x]
        rows = [label for label in x if label not in weight]
        of_input: list[View] = []
        if broadcast := [x.index(label) for label in shared if sizes[label] == 1]:
            of_input.append(("sum", broadcast, True))  # another input may have more there
        of_input += permute([x.index(label) for label in (*rows, *shared)])
        # An input of size 1 there is broadcast.
        of_input.append(("expand", *(-1 for _ in rows), *(sizes[label] for label in shared)))
        of_weight = list(permute([weight.index(label) for label in (*shared, *free)]))
        of_result: list[View] = []
        if len(shared) > 1:
            of_input.append(("flatten", -len(shared)))
            of_weight.append(("flatten", 0, len(shared) - 1))
        if not free:
            of_weight.append(("unsqueeze", -1))
            of_result.append(("squeeze", -1))
        elif len(free) > 1:
            of_weight.append(("flatten", 1))
            of_result.append(("unflatten", -1, tuple(sizes[label] for label in free)))
        made = [*rows, *free]
        of_result += permute([made.index(label) for label in self.result])
        return Views(tuple(of_input), tuple(of_weight), tuple(of_result))

    def _why_no_matmul(self, tensors: Sequence[Tensor], place: int) -> Because | None:
        """Why the operand at that place is no matmul's weight; None if it is."""
        x = self.operands[1 - place]
        weight = self.operands[place]
        sizes = dict(zip(weight, tensors[place].shape, strict=True))
        shared = [label for label in weight if label in x]
        if len(set(x)) < len(x) or len(set(weight)) < len(weight):
            return CallReason.DIAGONAL()
        if any(tensors[1 - place].shape[x.index(label)] != sizes[label] for label in shared):
            return CallReason.BROADCAST()
        if not shared:
            return CallReason.NOTHING_CONTRACTED()
        if any(label in self.result for label in shared):
            return WeightReason.BATCHED()
        if set(x) ^ set(weight) != set(self.result):
            return CallReason.SUMMED_ALONE()
        # torch multiplies it pointwise, which autocast does not cast.
        if all(sizes[label] == 1 for label in shared):
            return CallReason.CONTRACTS_ONE()
        return None


def _labels(term: str, dims: int) -> tuple[str, ...]:
    """A label for each dimension of an operand; the ellipsis counts from the right, as it broadcasts."""
    before, dots, after = term.partition("...")
    count = dims - len(before) - len(after)
    if count < 0 or (count and not dots):
        raise ValueError(f"{term!r} does not name {dims} dimensions")
    return (*before, *(f".{i}" for i in reversed(range(count))), *after)


def einsum(equation: str, dims: Sequence[int]) -> Contraction:
    """Of torch.einsum's equation for two operands of so many dimensions.

    >>> einsum("bk,nk->bn", (2, 2)).result
    ('b', 'n')

    Raises:
        ValueError: it does not fit them.
    """
    terms, arrow, result = equation.replace(" ", "").partition("->")
    first, second = (_labels(term, count) for term, count in zip(terms.split(","), dims, strict=True))
    labels = {*first, *second}
    dots = sorted((label for label in labels if label.startswith(".")), key=lambda label: -int(label[1:]))
    if arrow:
        before, mark, after = result.partition("...")
        return Contraction((first, second), (*before, *(dots if mark else ()), *after))
    letters = sorted(label for label in labels if label in string.ascii_letters)
    named_once = [label for label in letters if (*first, *second).count(label) == 1]
    return Contraction((first, second), (*dots, *named_once))


def tensordot(contracted: int | Sequence[Sequence[int]], dims: Sequence[int]) -> Contraction:
    """Of torch.tensordot's dimensions for two operands of so many.

    >>> tensordot(1, (2, 2)).operands
    (('a0', 'a1'), ('a1', 'b1'))

    Raises:
        IndexError: an operand has no such dimension.
    """
    if isinstance(contracted, int):
        contracted = range(dims[0] - contracted, dims[0]), range(contracted)
    first, second = ([f"{side}{i}" for i in range(count)] for side, count in zip("ab", dims, strict=True))
    for a, b in zip(*contracted, strict=True):
        second[b] = first[a]
    shared = set(first) & set(second)
    result = tuple(label for label in (*first, *second) if label not in shared)
    return Contraction((tuple(first), tuple(second)), result)
