"""The cost of the rewrite is linear in the graph: counted in calls, which other load on the machine does not change."""

from __future__ import annotations

import cProfile
import pstats

import pytest
from torch import fx

import fp8fx
from benchmarks.convert_cost import Stack, seconds_per_linear, share


def calls_per_linear(count: int, freeze: bool) -> float:
    gm = fx.symbolic_trace(Stack(count).requires_grad_(False))
    profile = cProfile.Profile()
    profile.runcall(fp8fx.convert, gm, freeze=freeze)
    return pstats.Stats(profile).total_calls / count


@pytest.mark.slow
@pytest.mark.parametrize("freeze", [False, True], ids=["", "freeze"])
def test_calls_per_linear_do_not_grow(freeze: bool) -> None:
    calls_per_linear(10, freeze)  # imports and caches
    assert calls_per_linear(2000, freeze) <= 1.05 * calls_per_linear(200, freeze)


def test_the_benchmark_runs() -> None:
    assert seconds_per_linear(10, 1) > 0


# Of the architectures of the zoo the one whose share is among the largest, as a fused call is opened; those of hundreds
# of nodes have less (docs/performance.md), but the C++ compiler takes a minute for each:
# `python -m benchmarks.convert_cost --zoo T5 Swinv2`.
@pytest.mark.compiles
def test_the_share_of_a_compilation() -> None:
    pytest.importorskip("transformers", reason="the demo extra is not installed", exc_type=ModuleNotFoundError)
    nodes, rewrite, whole = share("MultiheadAttention")
    assert nodes == 17
    assert 0 < rewrite < 0.02 * whole
