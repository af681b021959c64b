"""What follows from the table of recipes: each one's option, operators and module. A new recipe is its lines there."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch

import fp8fx
from fp8fx import nn
from fp8fx.config import Config
from fp8fx.ops import grouped_mm, matmul
from fp8fx.recipes.recipe import RECIPES

recipes = pytest.mark.parametrize("recipe", RECIPES)


@recipes
def test_it_is_an_option(recipe: str) -> None:
    assert RECIPES[recipe].name == recipe
    assert Config(recipe=recipe).recipe == recipe
    assert repr(RECIPES[recipe]) in Config(recipe=recipe).key()


@recipes
@pytest.mark.parametrize("kind", [matmul, grouped_mm], ids=["matmul", "grouped_mm"])
def test_it_has_both_operators(recipe: str, kind: object) -> None:
    (name,) = (key for key, value in {"matmul": matmul, "grouped_mm": grouped_mm}.items() if value is kind)
    operator = kind.op(recipe)  # type: ignore[attr-defined]
    assert operator is getattr(torch.ops.fp8fx, f"{name}_fp8_{recipe}").default


@recipes
def test_it_has_a_module(recipe: str) -> None:
    module = nn.MODULES[recipe]
    assert (module.recipe, getattr(nn, module.__name__), module.__module__) == (recipe, module, nn.__name__)
    assert module.__doc__
    linear, x = module(64, 32), torch.randn(3, 64)
    assert torch.equal(linear(x), matmul.op(recipe)(x, linear.weight.t(), bias=linear.bias))
    for copied in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert type(copied) is module
        assert torch.equal(copied(x), linear(x))


@recipes
def test_convert_takes_it(recipe: str) -> None:
    model, x = torch.nn.Linear(64, 32), torch.randn(3, 64)
    converted = fp8fx.convert(model, recipe=recipe)
    assert torch.equal(converted(x), nn.MODULES[recipe].from_linear(model)(x))


@pytest.mark.slow
def test_a_new_recipe_is_its_lines_in_the_table() -> None:
    """In a process of its own, since operators are registered once."""
    program = """
import importlib.util, pickle, sys, types, torch

# The table first, without the package that reads it.
package = types.ModuleType("fp8fx")
package.__path__ = importlib.util.find_spec("fp8fx").submodule_search_locations
sys.modules["fp8fx"] = package
from fp8fx.recipes import recipe as module
from fp8fx.recipes.recipe import Cast, Gemm, Recipe
from fp8fx.recipes.formats import E4M3

row = Cast(E4M3, "row")
module.RECIPES["narrow_rows"] = Recipe("narrow_rows", Gemm(row, row), dgrad=None, wgrad=None)

del sys.modules["fp8fx"]
import fp8fx
from fp8fx import nn
model, x = torch.nn.Linear(64, 32), torch.randn(3, 64)
linear = pickle.loads(pickle.dumps(nn.LinearFP8NarrowRows.from_linear(model)))
converted = fp8fx.convert(model, recipe="narrow_rows")
assert torch.equal(linear(x), converted(x))
print(converted.meta["fp8fx_report"].rewritten[0].op, nn.MODULES["narrow_rows"].__doc__)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("matmul_fp8_narrow_rows nn.Linear by the recipe 'narrow_rows'")
