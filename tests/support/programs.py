"""A module as source text: its forward, and the same by hand. `tests/support/writer.py` writes random ones."""

from __future__ import annotations

import contextlib
import itertools
import linecache
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.support.written import NAMES

__all__ = ["Line", "Program", "names"]


def laid(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """`x` in memory with these strides."""
    return (
        x if x.stride() == strides else torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)
    )


def names() -> dict[str, Any]:
    """What the source refers to."""
    return {**NAMES, "laid": laid, "DEVICE": torch.get_default_device().type}


@dataclass(frozen=True)
class Line:
    """One statement of a forward: what it assigns (nothing where it only acts), what it computes, how many matmuls of
    it the report shows and rewrites, and the context manager that it stands in, if any."""

    name: str
    written: str
    by_hand: str
    rows: int = 0
    rewritten: int = 0
    inside: str = ""

    def text(self, hand: bool) -> str:
        return (f"{self.name} = " if self.name else "") + (self.by_hand if hand else self.written)


@dataclass(frozen=True)
class Program:
    """A module as source.

    Attributes:
        seed: of its weights and inputs, and of what is checked.
        weights: statements of its constructor.
        inputs: expressions.
        lines: of its forward.
        outputs: the names that it returns.
        traceable: whether symbolic_trace can trace it.
        around: the context manager around a call, if any.
        sizes: what the inputs' expressions call their sizes, where these may be others too.
    """

    seed: int
    weights: tuple[str, ...]
    inputs: tuple[str, ...]
    lines: tuple[Line, ...]
    outputs: tuple[str, ...]
    traceable: bool
    around: str = ""
    sizes: Mapping[str, int] = field(default_factory=dict)

    @property
    def source(self) -> str:
        arguments = ", ".join(f"x{i}" for i in range(len(self.inputs)))
        returned = f"return {', '.join(self.outputs)}" + ("," if len(self.outputs) == 1 else "")

        def body(*lines: str, depth: int = 2) -> str:
            return "".join(f"{'    ' * depth}{line}\n" for line in lines)

        def forward(hand: bool) -> str:
            text = ""
            for inside, lines in itertools.groupby(self.lines, key=lambda line: line.inside):
                text += body(f"with {inside}:") if inside else ""
                text += body(*(line.text(hand) for line in lines), depth=3 if inside else 2)
            return text + body(returned)

        given = [
            *self.inputs,
            *(f"{name} = {size}" for name, size in self.sizes.items()),
            *([f"in {self.around}"] if self.around else []),
        ]
        return (
            f"class Model(nn.Module):  # seed {self.seed}; inputs: {', '.join(given)}\n"
            f"    def __init__(self):\n{body('super().__init__()', *self.weights)}"
            f"    def forward(self, {arguments}):\n{forward(False)}"
            f"    def by_hand(self, mm, {arguments}):\n{forward(True)}"
        )

    def model(self) -> Any:
        name, source = f"<fuzzed {self.seed}>", self.source
        linecache.cache[name] = len(source), None, source.splitlines(True), name
        scope = names()
        exec(compile(source, name, "exec"), scope)
        torch.manual_seed(self.seed)
        return scope["Model"]()

    def context(self) -> Any:
        return eval(self.around, names()) if self.around else contextlib.nullcontext()

    def arguments(self, grad: bool, sizes: Mapping[str, int] | None = None, values: int = 0) -> list[Tensor]:
        """Inputs of these sizes, other ones for each number of `values`."""
        torch.manual_seed(self.seed + 1 + 1_000_003 * values)
        scope = {**names(), **(self.sizes if sizes is None else sizes)}
        return [
            x.requires_grad_(grad and x.is_floating_point()) for x in (eval(text, dict(scope)) for text in self.inputs)
        ]
