"""The operators' names: torch.ops.fp8fx.<kind>_fp8_<recipe>, one of each kind for each recipe of the table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fp8fx.recipes.recipe import RECIPES, Recipe
from fp8fx.torch_internals import OpOverload

__all__ = ["name_of", "overload", "register"]

_library = torch.library.Library("fp8fx", "DEF")


def name_of(kind: str, recipe: str) -> str:
    """An operator's name.

    >>> name_of("matmul", "mixed")
    'matmul_fp8_mixed'
    """
    return f"{kind}_fp8_{recipe}"


def register(kind: str, arguments: str, implementation: Callable[..., Tensor]) -> None:
    """Registers an operator for each recipe: `implementation`, whose first argument is the recipe.

    They are CompositeImplicitAutograd: Dynamo, torch.export and FX see one node, AOTAutograd sees what it computes.
    """
    for recipe in RECIPES.values():
        name = name_of(kind, recipe.name)
        _library.define(f"{name}({arguments}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, _of_recipe(implementation, recipe), "CompositeImplicitAutograd")


def _of_recipe(implementation: Callable[..., Tensor], recipe: Recipe) -> Callable[..., Tensor]:
    def call(*args: Any, **kwargs: Any) -> Tensor:
        return implementation(recipe, *args, **kwargs)

    return call


def overload(kind: str, recipe: str) -> OpOverload:
    """The operator as a graph's node has it, such as `torch.ops.fp8fx.matmul_fp8_mixed.default`."""
    operator: OpOverload = getattr(torch.ops.fp8fx, name_of(kind, recipe)).default
    return operator
