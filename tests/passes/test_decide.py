"""decide: what the user's filters leave out becomes a Refusal, and the graph stays as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fp8fx.config import Config
from fp8fx.passes import decide, match
from tests.capture import after


class Block(nn.Module):
    """A linear called as a module and one written out."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 32)
        self.down = nn.Parameter(torch.randn(32, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.up(x)) @ self.down


class Model(nn.Module):
    """Two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 100)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


ALL = ["layers.0.up.weight", "layers.0.down", "layers.1.up.weight", "layers.1.down", "head.weight"]


def kept(**options: Any) -> list[str]:
    """The weights of what is left to rewrite."""
    gm = fx.symbolic_trace(Model())
    rewrite = after([match, decide], gm, **options)
    assert str(rewrite.gm.graph) == str(gm.graph)
    assert rewrite.results[1].modified is False
    assert rewrite.results[1].count == len(rewrite.refusals) == 5 - len(rewrite.matches)
    return [m.name for m in rewrite.matches]


def reasons(**options: Any) -> dict[str, str]:
    """The reason for each weight that is left out."""
    return {r.name: r.reason for r in after([match, decide], Model(), **options).refusals}


def test_the_default_keeps_all() -> None:
    assert kept() == ALL


@pytest.mark.parametrize(
    ("pattern", "left_out"),
    [
        ("head", ["head.weight"]),  # the module's path
        ("head.weight", ["head.weight"]),  # the weight's name
        ("layers.0", ["layers.0.down"]),  # the path of the module that a written-out linear stands in
        ("layers.0.*", ["layers.0.up.weight", "layers.0.down"]),
        ("*.down", ["layers.0.down", "layers.1.down"]),
        ("*.up", ["layers.0.up.weight", "layers.1.up.weight"]),
        ("layers.[1-9].*", ["layers.1.up.weight", "layers.1.down"]),
        ("*", ALL),
        ("HEAD", []),
        ("ead", []),
    ],
)
def test_exclude_and_include(pattern: str, left_out: list[str]) -> None:
    assert kept(exclude=pattern) == [name for name in ALL if name not in left_out]
    assert kept(include=pattern) == left_out
    assert reasons(exclude=pattern) == dict.fromkeys(left_out, f"excluded by {pattern!r}")
    assert reasons(include=pattern) == {name: f"not among include={pattern!r}" for name in ALL if name not in left_out}


def test_exclude_wins_over_include() -> None:
    assert kept(include="layers.*", exclude="layers.1*") == ["layers.0.up.weight", "layers.0.down"]


def test_several_patterns() -> None:
    assert kept(include=("head", "layers.0.up")) == ["layers.0.up.weight", "head.weight"]
    assert reasons(include=("a", "b"))["head.weight"] == "not among include='a', 'b'"
    assert reasons(exclude=("a", "head", "h*"))["head.weight"] == "excluded by 'head'"  # the first that fits


@pytest.mark.parametrize(
    ("least", "left"),
    [(0, ALL), (8, ALL), (9, [])],
)
def test_min_features(least: int, left: list[str]) -> None:
    assert kept(min_features=least) == left


def test_min_features_counts_the_smaller_of_k_and_n() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 8))
    rewrite = after([match, decide], model, min_features=32)
    assert [m.path for m in rewrite.matches] == ["1"]
    assert [r.reason for r in rewrite.refusals] == ["K=8, N=32: below min_features=32", "K=32, N=8: below min_features=32"]


def test_a_shared_module_is_left_out_every_time_it_is_called() -> None:
    linear = nn.Linear(8, 8)
    rewrite = after([match, decide], nn.Sequential(linear, nn.ReLU(), linear), exclude="0")
    assert (rewrite.matches, [r.path for r in rewrite.refusals]) == ([], ["0", "0"])


def test_nothing_to_decide() -> None:
    rewrite = after([match, decide], nn.ReLU(), exclude="*")
    assert (rewrite.matches, rewrite.refusals, rewrite.results[1].count) == ([], [], 0)


def test_should_rewrite_itself() -> None:
    found = after([match], Model()).matches[-1]
    assert decide.should_rewrite(found, Config()) is None
    assert decide.should_rewrite(found, Config(min_features=9)) == "K=8, N=100: below min_features=9"
