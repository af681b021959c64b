"""What FP8 gains: the model's laws, the choices that were measured on an H100, and choices by made-up times."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from fp8fx.profit.choice import Choice, choose, possible, should_merge
from fp8fx.profit.cost_model import MODEL, Linear, Times
from fp8fx.recipes.recipe import GEMMS, GLOBAL, MIXED, RECIPES, ROWWISE, Recipe
from tests.support.choices import remark_of

recipes = pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda recipe: recipe.name)


def linear(m: int, k: int = 4096, n: int = 4096, **others: object) -> Linear:
    return dataclasses.replace(Linear(m, k, n, torch.bfloat16), **others)  # type: ignore[arg-type]


@recipes
def test_a_large_linear_takes_every_gemm_of_the_recipe(recipe: Recipe) -> None:
    choice = choose(linear(8192, n=14336), recipe)
    assert choice.fp8 == recipe.gemms
    assert all(speed > 1.2 for speed in choice.speed.values())
    assert remark_of(choice) == f"predicted: {', '.join(f'{name} {choice.speed[name]:.2f}x' for name in recipe.gemms)}"


@recipes
@pytest.mark.parametrize("m", [0, 1, 16, 64])
def test_a_few_rows_are_not_worth_quantizing_a_weight(m: int, recipe: Recipe) -> None:
    choice = choose(linear(m), recipe)
    assert choice.fp8 == ()
    assert set(choice.speed) == set(recipe.gemms)
    assert all(speed < 1.05 for speed in choice.speed.values())


def test_only_wgrad_reads_no_weight_and_pays_at_fewer_rows() -> None:
    # Two Llama-3-8B blocks at M = 1024, all three in FP8: 4.35 ms of kernels a step against bfloat16's 4.27
    # (docs/performance.md).
    choice = choose(linear(1024, n=14336, siblings=2, input_fused=True, grad_fused=True), GLOBAL)
    assert choice.fp8 == ("wgrad",)
    assert choice.speed["wgrad"] > 1.05 > max(choice.speed["forward"], choice.speed["dgrad"])
    forward, dgrad, wgrad = (f"{name} {choice.speed[name]:.2f}x" for name in GEMMS)
    assert remark_of(choice) == f"predicted: {wgrad}; FP8 is not worth it, predicted: {forward}, {dgrad}"


@recipes
def test_only_what_is_computed_is_weighed(recipe: Recipe) -> None:
    assert choose(linear(8192, gemms=("forward",)), recipe).fp8 == ("forward",)
    assert set(choose(linear(8192, gemms=("forward", "dgrad")), recipe).speed) == {"forward", "dgrad"}
    assert "wgrad" not in choose(linear(8192), MIXED).speed


@recipes
@pytest.mark.parametrize("cheaper", [{"siblings": 3}, {"input_fused": True}], ids=str)
def test_a_shared_or_fused_input_makes_forward_faster(cheaper: dict[str, object], recipe: Recipe) -> None:
    alone = linear(8192, n=512, gemms=("forward",))
    assert (
        choose(dataclasses.replace(alone, **cheaper), recipe).speed["forward"] >= choose(alone, recipe).speed["forward"]
    )  # type: ignore[arg-type]
    assert (
        choose(dataclasses.replace(alone, siblings=3), recipe).speed["forward"] > choose(alone, recipe).speed["forward"]
    )


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

    exact = speed(torch.float32)
    torch.backends.cuda.matmul.allow_tf32 = True
    assert exact > speed(torch.float32) > speed(torch.bfloat16)


def test_the_best_set_is_at_least_as_good_as_all_or_nothing() -> None:
    for m in (512, 1024, 2048, 4096):
        choice = choose(linear(m, n=14336), GLOBAL)
        assert set(choice.fp8) <= set(GEMMS)
        assert all(choice.speed[name] > 1 for name in choice.fp8)


def test_a_choice_without_speeds_has_no_remark() -> None:
    assert remark_of(Choice(("forward",))) == ""


# A frozen weight.


@recipes
@pytest.mark.parametrize("m", [1, 16, 64, 512, 8192])
def test_a_frozen_weight_costs_nothing(m: int, recipe: Recipe) -> None:
    inference = linear(m, n=14336, gemms=("forward",))
    frozen = choose(dataclasses.replace(inference, frozen=True), recipe)
    assert frozen.fp8 == ("forward",)
    assert frozen.speed["forward"] > choose(inference, recipe).speed["forward"]
    assert frozen.weight_only == (m == 1)


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [(MIXED, ("forward", "dgrad")), (GLOBAL, ("forward", "dgrad")), (ROWWISE, ("forward",))],
    ids=str,
)
def test_what_a_frozen_weight_can_be_used_for(recipe: Recipe, expected: tuple[str, ...]) -> None:
    assert possible(GEMMS, recipe, frozen=True) == expected
    assert possible(["forward"], recipe, frozen=True) == ("forward",)
    assert possible(GEMMS, recipe, frozen=False) == recipe.gemms
    assert possible(["wgrad", "forward"], recipe, frozen=False) == tuple(
        name for name in recipe.gemms if name != "dgrad"
    )
    assert (
        choose(linear(8192, frozen=True), recipe).fp8
        == choose(linear(8192, frozen=True), recipe, always=True).fp8
        == expected
    )


def test_kernels_are_what_quantizing_a_few_rows_costs() -> None:
    def cost(m: int, recipe: Recipe = MIXED, **others: object) -> float:
        times = times_of(lambda linear, name, kind: 1e-6 if kind == "high" else 0.0)
        return 1e-6 / choose(linear(m, frozen=True, gemms=("forward",), **others), recipe, times).speed["forward"]

    assert cost(2, input_fused=True) == pytest.approx(1.5e-6, rel=0.01)
    assert cost(2) == pytest.approx(3e-6, rel=0.01)
    assert cost(2, siblings=2) == pytest.approx(1.5e-6, rel=0.01)
    assert cost(65) - cost(64) == pytest.approx(0.0, abs=1e-7)
    assert cost(65, GLOBAL) - cost(64, GLOBAL) == pytest.approx(1.5e-6, rel=0.01)  # amax over many rows takes two


@pytest.mark.parametrize("sizes", [(100, 4096), (4096, 100)], ids=str)
def test_a_frozen_weight_that_has_to_be_padded_is_copied(sizes: tuple[int, int]) -> None:
    def speed(k: int, n: int) -> float:
        times = times_of(lambda linear, name, kind: 10e-6)
        return choose(linear(16, k, n, frozen=True, gemms=("forward",)), GLOBAL, times).speed["forward"]

    assert speed(*sizes) < 0.9 * speed(*(size + -size % 16 for size in sizes))


# Times as measured: made up.


def times_of(gemm: Callable[[Linear, str, str], float | None]) -> Times:
    return Times(gemm, bandwidth=3e12)


def by_kind(high: float, fp8: float | None, weight_only: float | None = None) -> Times:
    """Microseconds, whatever the sizes."""
    us = {"high": high, "tensor": fp8, "row": fp8, "weight_only": weight_only}

    def gemm(linear: Linear, name: str, kind: str) -> float | None:
        found = us[kind]
        return None if found is None else found * 1e-6

    return times_of(gemm)


def decode(m: int = 1, **others: object) -> Linear:
    """A frozen linear whose input is quantized in 1.5 us, and next to nothing by its traffic."""
    return linear(m, 1024, 1024, frozen=True, input_fused=True, gemms=("forward",), **others)


@recipes
def test_each_gemm_is_asked_for_by_its_name_and_kind(recipe: Recipe) -> None:
    asked: list[tuple[str, str]] = []

    def gemm(linear: Linear, name: str, kind: str) -> float:
        asked.append((name, kind))
        return 1.0

    assert choose(linear(8192), recipe, times_of(gemm)).measured
    fp8 = {
        "mixed": {"forward": "row", "dgrad": "row"},
        "global": dict.fromkeys(GEMMS, "tensor"),
        "rowwise": dict.fromkeys(GEMMS, "row"),
    }
    assert sorted(asked) == sorted([*((name, "high") for name in recipe.gemms), *fp8[recipe.name].items()])


def test_measured_times_decide_and_the_remark_says_so() -> None:
    us = {
        ("forward", "high"): 2000.0,
        ("dgrad", "high"): 1000.0,
        ("forward", "tensor"): 500.0,
        ("dgrad", "tensor"): 990.0,
    }
    times = times_of(lambda linear, name, kind: us[name, kind] * 1e-6)
    choice = choose(linear(8192, gemms=("forward", "dgrad")), GLOBAL, times)
    assert (choice.fp8, choice.measured) == (("forward",), True)
    forward, dgrad = choice.speed["forward"], choice.speed["dgrad"]
    assert 3 < forward < 4 and 0.8 < dgrad < 1
    assert remark_of(choice) == f"measured: forward {forward:.2f}x; FP8 is not worth it, measured: dgrad {dgrad:.2f}x"


def test_one_time_that_is_not_known_leaves_everything_to_the_model() -> None:
    for unknown in ("high", "tensor"):
        times = times_of(
            lambda linear, name, kind, unknown=unknown: None if (name, kind) == ("wgrad", unknown) else 1.0
        )  # type: ignore[misc]
        assert (
            choose(linear(8192), GLOBAL, times) == choose(linear(8192), GLOBAL) == choose(linear(8192), GLOBAL, MODEL)
        )
        assert remark_of(choose(linear(8192), GLOBAL, times)).startswith("predicted: ")


def test_the_bandwidth_is_the_quantizations() -> None:
    def speed(bandwidth: float) -> float:
        return choose(linear(8192, gemms=("forward",)), GLOBAL, Times(by_kind(1000, 500).gemm, bandwidth)).speed[
            "forward"
        ]

    assert speed(1e12) < speed(3e12) < 2


@pytest.mark.parametrize(("fp8", "chosen"), [(7.9, True), (8.1, False)])
def test_what_is_quantized_at_run_time_has_to_gain_five_percent(fp8: float, chosen: bool) -> None:
    assert bool(choose(decode(16), GLOBAL, by_kind(10.0, fp8)).fp8) == chosen  # (8 + 1.5) * 1.05 is 10


@pytest.mark.parametrize(("weight_only", "chosen"), [(9.75, True), (9.85, False)])
def test_a_row_as_it_is_has_to_gain_two(weight_only: float, chosen: bool) -> None:
    choice = choose(decode(), GLOBAL, by_kind(10.0, 9.9, weight_only))
    assert (choice.fp8, choice.weight_only) == ((("forward",), True) if chosen else ((), False))
    assert choice.speed["forward"] == pytest.approx(10 / weight_only)


@pytest.mark.parametrize(("weight_only", "expected"), [(7.4, True), (7.6, False), (None, False)])
def test_a_row_is_left_as_it_is_where_that_is_no_slower_than_to_quantize_it(
    weight_only: float | None, expected: bool
) -> None:
    choice = choose(decode(), GLOBAL, by_kind(20.0, 6.0, weight_only))
    assert (choice.fp8, choice.weight_only, choice.measured) == (("forward",), expected, True)
    assert choice.speed["forward"] == pytest.approx(20 / (weight_only or 7.5) if expected else 20 / 7.5, rel=1e-3)
    assert remark_of(choice) == f"measured: forward {choice.speed['forward']:.2f}x"


def test_only_a_frozen_weight_and_a_single_row_have_that_way() -> None:
    times = by_kind(20.0, 6.0, 1.0)
    assert choose(decode(), GLOBAL, times).weight_only
    assert not choose(decode(2), GLOBAL, times).weight_only
    assert not choose(dataclasses.replace(decode(), frozen=False), GLOBAL, times).weight_only


def test_a_symbolic_m_is_judged_at_its_hint_and_a_single_row_apart() -> None:
    asked = []

    def gemm(linear: Linear, name: str, kind: str) -> float:
        asked.append((linear.m, kind))
        return {"high": 20e-6, "tensor": 6e-6, "weight_only": 7e-6}[kind]

    choice = choose(decode(32, dynamic=True), GLOBAL, times_of(gemm))
    assert (choice.fp8, choice.weight_only) == (("forward",), True)
    assert choice.speed["forward"] < 20 / 7.5  # at 32 rows, quantized
    assert sorted(asked) == [(1, "tensor"), (1, "weight_only"), (32, "high"), (32, "tensor")]
    assert not choose(decode(32, dynamic=True), GLOBAL, by_kind(20.0, 6.0, 8.0)).weight_only
    assert choose(decode(32, dynamic=True), GLOBAL, by_kind(6.0, 6.0, 1.0)) == choose(
        decode(32), GLOBAL, by_kind(6.0, 6.0, 1.0)
    )


def test_always_takes_every_gemm_and_compares_a_single_row_all_the_same() -> None:
    slow = by_kind(1.0, 6.0, 7.0)
    choice = choose(decode(), GLOBAL, slow, always=True)
    assert (choice.fp8, choice.weight_only, remark_of(choice)) == (("forward",), True, "")
    assert not choose(decode(), GLOBAL, by_kind(1.0, 6.0, 8.0), always=True).weight_only
    assert choose(decode(), GLOBAL, by_kind(1.0, None, 9.0), always=True) == choose(decode(), GLOBAL, always=True)
    never_asked = times_of(lambda linear, name, kind: pytest.fail("there is nothing to compare"))
    assert choose(linear(8192), GLOBAL, never_asked, always=True).fp8 == GEMMS


def test_dgrad_in_high_precision_needs_the_values_of_a_frozen_weight() -> None:
    # forward alone would gain 20 %, and the weight's values cost more than that.
    us = {"forward": {"high": 120.0, "tensor": 90.0}, "dgrad": {"high": 100.0, "tensor": 200.0}}
    times = times_of(lambda linear, name, kind: us[name][kind] * 1e-6)
    base = linear(16, 8192, 8192, frozen=True, gemms=("forward", "dgrad"))
    assert choose(dataclasses.replace(base, gemms=("forward",)), GLOBAL, times).fp8 == ("forward",)
    assert choose(base, GLOBAL, times).fp8 == ()


def test_a_frozen_weight_is_never_used_by_dgrad_alone() -> None:
    us = {"forward": {"high": 50.0, "tensor": 100.0}, "dgrad": {"high": 500.0, "tensor": 100.0}}
    times = times_of(lambda linear, name, kind: us[name][kind] * 1e-6)
    assert choose(linear(16, frozen=True), GLOBAL, times).fp8 == ("forward", "dgrad")
    us["dgrad"]["tensor"] = 490.0
    assert choose(linear(16, frozen=True), GLOBAL, times).fp8 == ()


def test_a_scale_a_row_is_found_by_the_kernel_that_casts_whatever_m() -> None:
    """At 256 x 4096 x 4096 on an H100, whose times these are, FP8 gains only if nothing else looks for the scale."""
    times = Times(lambda linear, name, kind: 20.3e-6 if kind == "high" else 14.9e-6, bandwidth=3e12)
    one = linear(256, frozen=True, gemms=("forward",))
    assert choose(one, MIXED, times).fp8 == choose(one, ROWWISE, times).fp8 == ("forward",)
    assert choose(one, GLOBAL, times).fp8 == ()


def test_siblings_are_merged_unless_copies_take_longer_than_that_saves() -> None:
    # q, k and v of Llama-3-8B at M = 8192. Copies move 4 bytes a value at 3 TB/s: 67 us for all of them.
    merged, widths = linear(8192, n=6144, frozen=True, gemms=("forward",)), (4096, 1024, 1024)

    def by_n(together: float) -> Times:
        us = {6144: together, 4096: 200.0, 1024: 60.0}
        return times_of(lambda linear, name, kind: us[linear.n] * 1e-6)

    never_asked = times_of(lambda linear, name, kind: pytest.fail("nothing is copied"))
    assert should_merge(merged, widths, 0, ROWWISE, never_asked)
    assert not should_merge(merged, widths, 6144, ROWWISE, by_n(300.0))
    assert should_merge(merged, widths, 6144, ROWWISE, by_n(250.0))
    assert should_merge(merged, widths, 1024, ROWWISE, by_n(300.0))  # 11 us
    assert not should_merge(merged, widths, 6144, ROWWISE)
    assert not should_merge(merged, widths, 6144, ROWWISE, by_kind(1.0, None))  # predicted, then
    assert should_merge(dataclasses.replace(merged, m=64), widths, 6144, ROWWISE)
    assert should_merge(merged, widths, 6144, ROWWISE.only(()))
