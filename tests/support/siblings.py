"""Linears of one input, and what merge makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fp8fx.passes.rewrite import check, decide, freeze, match, merge, replace

PASSES = (match, check, decide, replace, merge, freeze)
K = 16
RECIPES = ("mixed", "global", "rowwise")
recipes = pytest.mark.parametrize("recipe", RECIPES)


def op(recipe: str) -> Any:
    return getattr(torch.ops.fp8fx, f"matmul_fp8_{recipe}").default


class Siblings(nn.Module):
    """Some linears and a function of them as its forward."""

    def __init__(
        self,
        function: Callable[[Siblings, Tensor], Any],
        widths: Sequence[int] = (16, 16, 16),
        biases: Sequence[bool] = (False,) * 3,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        for name, n, bias in zip("qkv", widths, biases, strict=False):
            self.add_module(name, nn.Linear(K, n, bias=bias))
        self.other = nn.Linear(K, K)
        self.kn = nn.Parameter(torch.randn(K, 24) / 4)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def example(*leading: int) -> Tensor:
    return torch.randn(*(leading or (4,)), K)


def products(gm: fx.GraphModule, recipe: str = "rowwise") -> list[fx.Node]:
    return list(gm.graph.find_nodes(op="call_function", target=op(recipe)))


def widths(gm: fx.GraphModule, recipe: str = "rowwise") -> list[int]:
    """N of each op, as its frozen weight has it."""
    return [_data(gm, node.args[1].args[0]).shape[0] for node in products(gm, recipe)]


def _data(gm: fx.GraphModule, node: fx.Node) -> Tensor:
    """The FP8 data that a node reads: of a parameter of the graph's own, or looked up."""
    if node.op == "get_attr":
        return gm.get_parameter(node.target)
    lookup, index = node.args
    (entry,) = gm.get_submodule(lookup.target)._seen.values()  # type: ignore[operator, union-attr]
    data: Tensor = entry.buffers[index]
    return data


def splits(gm: fx.GraphModule) -> list[list[int]]:
    """The widths of each merged op's parts."""
    found: dict[Any, list[int]] = {}
    for node in gm.graph.find_nodes(op="call_method", target="narrow"):
        found.setdefault(node.args[0], []).append(node.args[3])
    return list(found.values())


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def assert_same_results(new: Any, old: Any, x: Tensor) -> None:
    """Per row, merging changes no FP8 value; a wider GEMM may sum in another order."""
    for actual, expected in zip(flat(new(x)), flat(old(x)), strict=True):
        assert (actual.dtype, actual.shape, actual.is_contiguous()) == (
            expected.dtype,
            expected.shape,
            expected.is_contiguous(),
        )
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def qkv(p: Siblings, x: Tensor) -> tuple[Tensor, ...]:
    return p.q(x), p.k(x), p.v(x)


def error(x: Tensor, reference: Tensor) -> float:
    return float((x.double() - reference).norm() / reference.norm())
