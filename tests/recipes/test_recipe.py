"""Recipes: the contract's table, and what no recipe can be."""

from __future__ import annotations

import pytest
import torch

from fp8fx.errors import ConfigError
from fp8fx.recipes.formats import E4M3, E4M3_FULL, E5M2
from fp8fx.recipes.recipe import GLOBAL, MIXED, RECIPES, ROWWISE, Cast, Gemm, Recipe

TENSOR, BLOCK, GRAD = Cast(E4M3, "tensor"), Cast(E4M3, "block"), Cast(E5M2, "tensor")


def test_recipes_are_the_contract() -> None:
    mixed = Recipe("mixed", Gemm(BLOCK, TENSOR), Gemm(Cast(E5M2, "block"), TENSOR), None)
    per_tensor = Recipe("global", Gemm(TENSOR, TENSOR), Gemm(GRAD, TENSOR), Gemm(TENSOR, GRAD))
    row = Cast(E4M3_FULL, "row")
    per_row = Recipe("rowwise", *(Gemm(row, row) for _ in range(3)))
    assert dict(RECIPES).items() >= {"mixed": mixed, "global": per_tensor, "rowwise": per_row}.items()
    assert [mixed, per_tensor, per_row] == [MIXED, GLOBAL, ROWWISE]
    assert (E4M3_FULL.dtype, E4M3_FULL.target) == (torch.float8_e4m3fn, torch.finfo(torch.float8_e4m3fn).max)


def test_two_e5m2_operands_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"two E5M2 operands .* at most one"):
        Gemm(GRAD, GRAD)


@pytest.mark.parametrize(
    ("forward", "dgrad", "wgrad"),
    [
        (Gemm(TENSOR, BLOCK), None, None),
        (Gemm(TENSOR, TENSOR), Gemm(GRAD, BLOCK), None),
        (Gemm(TENSOR, TENSOR), None, Gemm(BLOCK, GRAD)),
        (Gemm(TENSOR, TENSOR), None, Gemm(TENSOR, Cast(E5M2, "block"))),
    ],
    ids=["forward.rhs", "dgrad.rhs", "wgrad.lhs", "wgrad.rhs"],
)
def test_blocks_where_none_can_be_are_refused(forward: Gemm, dgrad: Gemm | None, wgrad: Gemm | None) -> None:
    with pytest.raises(ConfigError, match=r"recipe 'mine' blocks .*only a and dgrad's grad take blocks"):
        Recipe("mine", forward, dgrad, wgrad)
