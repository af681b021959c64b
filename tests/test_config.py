"""Configurations: frozen, validated, and errors that name what is valid."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from fp8fx import config
from fp8fx.config import PROFITS, Config
from fp8fx.errors import ConfigError, FP8Error, unknown
from fp8fx.executors import registry
from fp8fx.recipes.formats import E4M3
from fp8fx.recipes.recipe import GLOBAL, MIXED, RECIPES, Cast

TENSOR = Cast(E4M3, "tensor")


@pytest.mark.parametrize("value", [Config(), MIXED, MIXED.forward, TENSOR, E4M3], ids=lambda v: type(v).__name__)
def test_everything_is_frozen(value: Any) -> None:
    name = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, name, getattr(value, name))


def test_defaults() -> None:
    flags = {"routers": False, "convolutions": False, "freeze": False}
    assert Config() == Config(
        recipe="mixed", executor="auto", include=("*",), exclude=(), min_features=0, profit="auto", **flags
    )


_RECIPES = ", ".join(sorted(RECIPES))
_EXECUTORS = ", ".join(sorted(registry.names()))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("executor", registry.names())
def test_every_recipe_and_executor_is_accepted(recipe: str, executor: str) -> None:
    assert (Config(recipe=recipe, executor=executor).recipe, Config(executor=executor).executor) == (recipe, executor)


@pytest.mark.parametrize("profit", PROFITS)
def test_every_profit_is_accepted_and_part_of_the_key(profit: str) -> None:
    assert Config(profit=profit).profit == profit
    assert [other for other in PROFITS if Config(profit=other).key() == Config(profit=profit).key()] == [profit]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "fp4"}, rf"unknown recipe 'fp4'; expected one of {_RECIPES}\.$"),
        ({"recipe": "mixd"}, rf"unknown recipe 'mixd'; expected one of {_RECIPES}\. Did you mean 'mixed'\?"),
        ({"recipe": None}, rf"unknown recipe None; expected one of {_RECIPES}"),
        ({"recipe": ["mixed"]}, rf"unknown recipe \['mixed'\]; expected one of {_RECIPES}"),
        ({"executor": "cuda"}, rf"unknown executor 'cuda'; expected one of {_EXECUTORS}\.$"),
        ({"executor": "scaled"}, r"unknown executor 'scaled'; .* Did you mean 'scaled_mm'\?"),
        ({"profit": "sometimes"}, r"unknown profit 'sometimes'; expected one of always, auto, never\.$"),
        ({"profit": "nevr"}, r"unknown profit 'nevr'; .* Did you mean 'never'\?"),
        ({"include": 3}, r"include=3 .*expected fnmatch patterns such as"),
        ({"include": None}, r"include=None .*expected fnmatch patterns"),
        ({"exclude": ["a", 3]}, r"exclude=\['a', 3\] .*expected fnmatch patterns"),
        ({"min_features": -1}, r"min_features=-1 .*expected an int of at least 0"),
        ({"min_features": 1.5}, r"min_features=1\.5 .*expected an int of at least 0"),
        ({"freeze": 1}, r"freeze=1 is not a bool"),
        ({"routers": "no"}, r"routers='no' is not a bool; expected True or False"),
        ({"convolutions": None}, r"convolutions=None is not a bool"),
        ({"min_features": True}, r"min_features=True .*expected an int of at least 0"),
    ],
    ids=str,
)
def test_an_invalid_value_is_refused_and_the_valid_ones_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        Config(**options)
    assert isinstance(error.value, FP8Error)
    assert isinstance(error.value, ValueError)


def test_patterns_become_a_tuple() -> None:
    assert Config(include="a.*").include == ("a.*",)
    assert Config(exclude=["a", "b"]).exclude == ("a", "b")  # type: ignore[arg-type]
    hash(Config(include=["a"]))  # type: ignore[arg-type]


def test_of_puts_options_over_the_config() -> None:
    base = Config(recipe="global", min_features=16)
    assert Config.of(None, {}) == Config()
    assert Config.of(base, {}) == base
    assert Config.of(base, {"min_features": 32, "executor": "simulated"}) == Config(
        "global", "simulated", min_features=32
    )
    assert base.min_features == 16


def test_of_refuses_an_unknown_option() -> None:
    names = "attention, convolutions, exclude, executor, freeze, include, layers, min_features, profit, recipe, routers"
    with pytest.raises(
        ConfigError, match=rf"unknown option 'recipes'; expected one of {names}\. Did you mean 'recipe'\?"
    ):
        Config.of(None, {"recipes": "mixed"})


def test_of_validates_what_it_sets() -> None:
    with pytest.raises(ConfigError, match="unknown recipe 'fp4'"):
        Config.of(Config(), {"recipe": "fp4"})


@pytest.mark.parametrize("given", ["mixed", {"recipe": "mixed"}, 3])
def test_of_refuses_what_is_no_config(given: Any) -> None:
    with pytest.raises(ConfigError, match=rf"config is a {type(given).__name__}; expected fp8fx\.Config"):
        Config.of(given, {})


def test_names_are_the_options() -> None:
    assert (
        " ".join(Config.names())
        == "recipe executor include exclude min_features routers convolutions profit freeze attention layers"
    )


def test_key_differs_with_every_field() -> None:
    others = [
        {"recipe": "global"},
        {"executor": "simulated"},
        {"include": "a"},
        {"exclude": "a"},
        {"min_features": 1},
        {"routers": True},
        {"convolutions": True},
        {"profit": "always"},
        {"freeze": True},
        {"attention": "leave"},
        {"layers": "each"},
    ]
    assert [name for other in others for name in other] == list(Config.names())  # none forgotten
    keys = [Config().key(), *(Config(**other).key() for other in others)]
    assert len(set(keys)) == len(keys)
    assert Config().key() == Config().key()


def test_key_differs_with_what_the_recipe_says(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Config().key()
    monkeypatch.setattr(config, "RECIPES", {**RECIPES, "mixed": dataclasses.replace(MIXED, wgrad=GLOBAL.wgrad)})
    assert Config().key() != before


def test_unknown_sorts_the_names_and_hints_only_at_a_near_one() -> None:
    assert (
        str(unknown("fruit", "aple", ["pear", "apple"]))
        == "unknown fruit 'aple'; expected one of apple, pear. Did you mean 'apple'?"
    )
    assert str(unknown("fruit", "xyz", ["pear", "apple"])) == "unknown fruit 'xyz'; expected one of apple, pear."


@pytest.mark.parametrize("freeze", [0, None, "true", 1.0], ids=repr)
def test_freeze_is_true_or_false_and_nothing_like_it(freeze: Any) -> None:
    with pytest.raises(ConfigError, match=rf"freeze={freeze!r} is not a bool; expected True or False"):
        Config.of(Config(), {"freeze": freeze})
    assert Config.of(Config(freeze=True), {"recipe": "global"}) == Config("global", freeze=True)
