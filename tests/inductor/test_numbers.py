"""Numbers that FP8 finds hard: not finite, huge, tiny, subnormal, all zero, a few much larger than the rest."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from tests.support.numbers import (
    CALLS,
    SCALES,
    SUBNORMAL,
    assert_every_bit,
    assert_no_row_harms_another,
    assert_outliers_cost_no_precision,
    assert_subnormals_lose_no_more_than_other_numbers,
    assert_zero_weights_give_the_bias,
    by_backend,
    by_op,
)

RECIPES = ("mixed", "global", "rowwise")
recipes = pytest.mark.parametrize("recipe", RECIPES)


@pytest.mark.compiles
@pytest.mark.parametrize(
    "how", [pytest.param(how, marks=[pytest.mark.compiles] if "compiled" in how else []) for how in CALLS]
)
def test_a_row_harms_no_other(how: str) -> None:
    assert_no_row_harms_another(how, 12, "cpu")


@recipes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("exponents", SCALES, ids=str)
def test_tiny_and_huge_values_keep_every_bit(exponents: Sequence[int], dtype: torch.dtype, recipe: str) -> None:
    assert_every_bit(exponents, dtype, by_op(recipe), "cpu")


@pytest.mark.compiles
@pytest.mark.parametrize(
    "recipe", ["mixed", "global"]
)  # tests/gpu/test_bad_days_cuda.py has all of these for all recipes
def test_tiny_and_huge_values_keep_every_bit_through_inductor(recipe: str) -> None:
    train = by_backend(recipe)
    for exponents in SCALES:
        assert_every_bit(exponents, torch.float32, train, "cpu")


@recipes
@pytest.mark.parametrize(("where", "exponent"), SUBNORMAL)
def test_fp16_subnormals_lose_no_more_than_other_numbers(where: int, exponent: int, recipe: str) -> None:
    assert_subnormals_lose_no_more_than_other_numbers(where, exponent, by_op(recipe), "cpu")


@pytest.mark.compiles
def test_fp16_subnormals_through_inductor() -> None:
    train = by_backend("rowwise")
    for where, exponent in SUBNORMAL:
        assert_subnormals_lose_no_more_than_other_numbers(where, exponent, train, "cpu")


@recipes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_channel_of_outliers_leaves_the_others_their_precision(dtype: torch.dtype, recipe: str) -> None:
    assert_outliers_cost_no_precision(dtype, by_op(recipe), "cpu")


@pytest.mark.compiles
def test_a_channel_of_outliers_through_inductor() -> None:
    assert_outliers_cost_no_precision(torch.float32, by_backend("global"), "cpu")


@pytest.mark.parametrize("freeze", [False, True], ids=["", "frozen"])
@recipes
def test_zero_weights_give_the_bias(recipe: str, freeze: bool) -> None:
    assert_zero_weights_give_the_bias(recipe, freeze, False, "cpu")
