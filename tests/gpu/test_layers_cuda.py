"""Layers that repeat are compiled once, on FP8 tensor cores: trained, frozen, and in CUDA graphs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import fp8fx
from fp8fx.recipes.recipe import RECIPES
from tests.support.layers import FLIPS, Decoder, assert_trains, compiled
from tests.support.numbers import error

HAS_TENSOR_CORES = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_TENSOR_CORES, reason="needs a CUDA device of compute capability 8.9 or higher"),
]


def inputs(count: int, rows: int = 64) -> list[Tensor]:
    return [torch.randn(2, rows, 32, device="cuda") for _ in range(count)]


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_training_gives_what_the_ops_give(recipe: str) -> None:
    assert_trains(Decoder().cuda(), inputs(3), recipe=recipe)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_frozen_layers(recipe: str, mode: str) -> None:
    model = Decoder().eval().requires_grad_(False).cuda()
    expected = copy.deepcopy(model)
    fp8fx.freeze(model, recipe)
    call = torch.compile(model, backend="fp8", options={"mode": mode})
    with torch.no_grad():
        for x in inputs(3):
            assert error(call(x).clone(), expected(x)) < FLIPS


@pytest.mark.parametrize("layers", ["once", "each"])
def test_training_in_cuda_graphs(layers: str) -> None:
    model = Decoder().cuda()
    reference = copy.deepcopy(model)
    options: dict[str, Any] = {"profit": "always", "layers": layers, "mode": "reduce-overhead"}
    call = torch.compile(model, backend="fp8", options=options)
    for x in inputs(4):
        torch.compiler.cudagraph_mark_step_begin()
        call(x).square().mean().backward()
        reference(x).square().mean().backward()
        for value, expected in zip(model.parameters(), reference.parameters(), strict=True):
            assert value.grad is not None and expected.grad is not None
            assert error(value.grad, expected.grad) < 3 * FLIPS
            # The next replay writes to the memory of these gradients.
            value.grad = expected.grad = None


def test_memory_of_a_step_stays_within_a_tenth() -> None:
    peaks = {}
    for layers in ("each", "once"):
        torch._dynamo.reset()
        model = Decoder(6).cuda()
        call, _ = compiled(model, layers=layers)
        (x,) = inputs(1, rows=2048)
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            call(x).square().mean().backward()
            model.zero_grad()
        peaks[layers] = torch.cuda.max_memory_allocated()
    assert peaks["once"] < 1.1 * peaks["each"]
