"""The model of what FP8 gains: its laws, and the choices that were measured on an H100."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fp8fx.config import GEMMS, GLOBAL, MIXED, RECIPES, Recipe
from fp8fx.profit import Choice, Linear, choose

recipes = pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda recipe: recipe.name)


def linear(m: int, k: int = 4096, n: int = 4096, **others: object) -> Linear:
    return dataclasses.replace(Linear(m, k, n, torch.bfloat16), **others)  # type: ignore[arg-type]


@recipes
def test_a_large_linear_takes_every_gemm_of_the_recipe(recipe: Recipe) -> None:
    choice = choose(linear(8192, n=14336), recipe)
    assert choice.fp8 == recipe.gemms
    assert all(speed > 1.2 for speed in choice.speed.values())
    assert choice.remark == ""


@recipes
@pytest.mark.parametrize("m", [0, 1, 16, 64])
def test_a_few_rows_are_not_worth_quantizing_a_weight(m: int, recipe: Recipe) -> None:
    choice = choose(linear(m), recipe)
    assert choice.fp8 == ()
    assert set(choice.speed) == set(recipe.gemms)
    assert all(speed < 1.05 for speed in choice.speed.values())


def test_only_wgrad_reads_no_weight_and_pays_at_fewer_rows() -> None:
    # Two Llama-3-8B blocks at M = 1024, all three in FP8: 4.35 ms of kernels a step against bfloat16's 4.27 (docs/performance.md).
    choice = choose(linear(1024, n=14336, siblings=2, input_fused=True, grad_fused=True), GLOBAL)
    assert choice.fp8 == ("wgrad",)
    assert choice.speed["wgrad"] > 1.05 > max(choice.speed["forward"], choice.speed["dgrad"])
    assert choice.remark == f"FP8 is not worth it, predicted: forward {choice.speed['forward']:.2f}x, dgrad {choice.speed['dgrad']:.2f}x"


@recipes
def test_only_what_is_computed_is_weighed(recipe: Recipe) -> None:
    assert choose(linear(8192, gemms=("forward",)), recipe).fp8 == ("forward",)
    assert set(choose(linear(8192, gemms=("forward", "dgrad")), recipe).speed) == {"forward", "dgrad"}
    assert "wgrad" not in choose(linear(8192), MIXED).speed


@recipes
@pytest.mark.parametrize("cheaper", [{"siblings": 3}, {"input_fused": True}], ids=str)
def test_a_shared_or_fused_input_makes_forward_faster(cheaper: dict[str, object], recipe: Recipe) -> None:
    alone = linear(8192, n=512, gemms=("forward",))
    assert choose(dataclasses.replace(alone, **cheaper), recipe).speed["forward"] >= choose(alone, recipe).speed["forward"]  # type: ignore[arg-type]
    assert choose(dataclasses.replace(alone, siblings=3), recipe).speed["forward"] > choose(alone, recipe).speed["forward"]


def test_a_fused_gradient_makes_the_gradients_faster() -> None:
    alone = choose(linear(8192, k=512), GLOBAL)
    fused = choose(linear(8192, k=512, grad_fused=True), GLOBAL)
    assert set(alone.fp8) <= set(fused.fp8)
    assert fused.speed["wgrad"] > alone.speed["wgrad"]


@recipes
def test_more_rows_never_make_it_worse(recipe: Recipe) -> None:
    counts = [len(choose(linear(m), recipe).fp8) for m in (1, 256, 1024, 2048, 4096, 8192, 16384)]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, len(recipe.gemms))


def test_float32_gains_at_fewer_rows_than_bfloat16_and_tf32_lies_between() -> None:
    def speed(dtype: torch.dtype) -> float:
        return choose(linear(512, gemms=("forward",), dtype=dtype), GLOBAL).speed["forward"]

    exact, before = speed(torch.float32), torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert exact > speed(torch.float32) > speed(torch.bfloat16)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_the_best_set_is_at_least_as_good_as_all_or_nothing() -> None:
    for m in (512, 1024, 2048, 4096):
        choice = choose(linear(m, n=14336), GLOBAL)
        assert set(choice.fp8) <= set(GEMMS)
        assert all(choice.speed[name] > 1 for name in choice.fp8)


def test_a_choice_without_speeds_has_no_remark() -> None:
    assert Choice(("forward",)).remark == ""
