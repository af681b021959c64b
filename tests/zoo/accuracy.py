"""The rule by which a result is right: it errs no more than the formats explain.

It is that of PyTorch's own benchmark suites for compilers: a result is compared, in float64, with a float64 run of the
eager model, and may err so many times as much as the eager model in bfloat16 (weights and inputs) does. How many times,
the formats say: what is rounded to a grid errs in proportion to its step, and where bfloat16 has 7 bits of mantissa,
E4M3 has 3 and E5M2, in which gradients are quantized, 2.

    |output - reference|    <= 2^(7-3) |bfloat16's output - reference|     the output as a whole
    |row - reference|       <= 2 2^(7-3) ...                               each of its rows, which as a smaller sample
    varies more |gradient - reference|  <= 2^(7-2) ...                                 each parameter's gradient

in Euclidean norms. On a row or a parameter where bfloat16 errs less than on average, relative to the reference, the
average counts: small samples are lucky at times. There is no other slack: what is not finite fails, and so does an
error where bfloat16 makes none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fp8fx.recipes.quantize import sqnr

__all__ = ["ALLOWED", "Accuracy", "Result", "judged"]

ALLOWED = {"output": 2.0**4, "row": 2.0**5, "gradient": 2.0**5}
"""Errors, in units of bfloat16's."""


@dataclass(frozen=True)
class Result:
    """What one run of a model gave, in float64.

    Attributes:
        output: (*, features).
        gradients: by parameter; none in inference.
    """

    output: Tensor
    gradients: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> Tensor:
        """(rows, features)."""
        return self.output.flatten(0, -2)

    @property
    def gradient(self) -> Tensor:
        """All gradients as one vector; empty in inference."""
        return torch.cat([torch.empty(0), *(x.flatten() for x in self.gradients.values())])


@dataclass(frozen=True)
class Accuracy:
    """Of one result.

    Attributes:
        output_db, gradient_db: signal over noise, of all gradients together; None in inference.
        times: the worst errors in units of bfloat16's, by the names in ALLOWED.
        where: the parameter with the worst gradient.
    """

    output_db: float
    gradient_db: float | None
    times: Mapping[str, float]
    where: str = ""

    @property
    def problems(self) -> list[str]:
        """How it breaks the rule."""
        found = ((name, x, f" of {self.where}" if name == "gradient" else "") for name, x in self.times.items())
        return [
            f"{name}{of}: {x:.1f} times bfloat16's error, not {ALLOWED[name]:.0f}"
            for name, x, of in found
            if not x <= ALLOWED[name]
        ]


def _times(reference: Tensor, half: Tensor, value: Tensor, average: float = 0.0) -> float:
    """The error of `value` in units of `half`'s, or of `average`, which is relative, where that is more."""
    error, unit = (
        float((value - reference).norm()),
        max(float((half - reference).norm()), average * float(reference.norm())),
    )
    return error / unit if unit else 0.0 if error == 0 else float("inf")


def _relative(reference: Tensor, value: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


def _worst(times: Iterable[tuple[float, str]]) -> tuple[float, str]:
    return max(times, key=lambda pair: float("inf") if pair[0] != pair[0] else pair[0])


def judged(reference: Result, half: Result, value: Result) -> Accuracy:
    """Of `value`, against a float64 run and in units of what a bfloat16 run of the eager model errs."""
    average = _relative(reference.output, half.output)
    rows = zip(reference.rows, half.rows, value.rows, strict=True)
    times = {
        "output": _times(reference.output, half.output, value.output),
        "row": _worst((_times(*row, average), "") for row in rows)[0],
    }
    if not reference.gradients:
        return Accuracy(sqnr(reference.output, value.output), None, times)
    average = _relative(reference.gradient, half.gradient)
    gradients = (
        (_times(x, half.gradients[name], value.gradients[name], average), name)
        for name, x in reference.gradients.items()
    )
    times["gradient"], where = _worst(gradients)
    return Accuracy(sqnr(reference.output, value.output), sqnr(reference.gradient, value.gradient), times, where)
