"""The rule itself: what passes, what fails, and that each of its three parts can fail alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.zoo.accuracy import ALLOWED, Result, judged

ROWS, FEATURES = 32, 128


def noisy(x: Tensor, relative: float) -> Tensor:
    """With an error of exactly that size in every row."""
    error = torch.randn_like(x)
    return x + relative * error * x.norm(dim=-1, keepdim=True) / error.norm(dim=-1, keepdim=True)


def result(relative: float = 0.0) -> Result:
    generator, shapes = (
        torch.Generator().manual_seed(1),
        {"output": (2, ROWS // 2, FEATURES), "weight": (64, 8), "bias": (1, 8)},
    )
    exact = {name: torch.randn(*shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    output, *gradients = (noisy(x, relative) for x in exact.values())
    return Result(output, dict(zip(("weight", "bias"), gradients, strict=True)))


REFERENCE = result()
HALF = 2.0**-8


def problems(value: Result, half: Result | None = None) -> list[str]:
    return [problem.partition(":")[0] for problem in judged(REFERENCE, half or result(HALF), value).problems]


@pytest.mark.parametrize("relative", [0.0, HALF, 15.9 * HALF])
def test_what_the_formats_explain_passes(relative: float) -> None:
    found = judged(REFERENCE, result(HALF), result(relative))
    assert found.problems == []
    assert found.times == pytest.approx(dict.fromkeys(ALLOWED, relative / HALF))
    if relative:
        assert found.output_db == pytest.approx(-20 * math.log10(relative), abs=0.01)
        assert found.gradient_db == pytest.approx(-20 * math.log10(relative), abs=0.01)


def test_an_error_of_another_size_fails() -> None:
    assert problems(dataclasses.replace(result(), output=noisy(REFERENCE.output, 16.1 * HALF))) == ["output"]
    gradients = REFERENCE.gradients | {"bias": noisy(REFERENCE.gradients["bias"], 32.1 * HALF)}
    assert problems(Result(REFERENCE.output, gradients)) == ["gradient of bias"]


@pytest.mark.parametrize(
    "break_row", [Tensor.zero_, Tensor.neg_, lambda row: row.mul_(1.2)], ids=["zero", "negative", "too large"]
)
def test_one_wrong_row_of_many_fails(break_row: Callable[[Tensor], Tensor]) -> None:
    value = result(8 * HALF)
    break_row(value.output[0, 0])
    assert "row" in problems(value)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_fails(bad: float) -> None:
    value = result(HALF)
    value.output[0, 0, 0] = bad
    value.gradients["weight"][0, 0] = bad
    assert problems(value) == ["output", "row", "gradient of weight"]


def test_where_bfloat16_is_lucky_its_average_counts() -> None:
    half = result(HALF)
    half.output[0, 0] = REFERENCE.output[0, 0]
    half.gradients["bias"].copy_(REFERENCE.gradients["bias"])
    assert problems(result(15 * HALF), half) == []
    assert "row" in problems(result(40 * HALF), half)


def test_an_error_where_bfloat16_makes_none_fails() -> None:
    half = result()
    assert problems(result(), half) == []
    assert problems(result(1e-6), half) == ["output", "row", "gradient of weight"]


def test_without_gradients_none_are_judged() -> None:
    found = judged(Result(REFERENCE.output), result(HALF), Result(result(HALF).output))
    assert found.gradient_db is None
    assert found.times.keys() == {"output", "row"}
