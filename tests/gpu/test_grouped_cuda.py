"""Grouped matmuls on Hopper's tensor cores: the simulation's values, compiled training, and what `auto` means."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fp8fx
from fp8fx.config import Config
from fp8fx.executors.hardware import has_fp8_tensor_cores
from fp8fx.executors.registry import resolve
from fp8fx.ops import grouped_mm as grouped
from fp8fx.recipes.quantize import sqnr
from fp8fx.recipes.recipe import RECIPES

CUDA = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not has_fp8_tensor_cores(CUDA) or not resolve("auto", CUDA, groups=True).tensor_cores,
        reason="needs a CUDA device of compute capability 9.0",
    ),
]

recipes = pytest.mark.parametrize("recipe", list(RECIPES))


class Experts(nn.Module):
    def __init__(self, experts: int = 4, k: int = 256, n: int = 384) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, n, k, device=CUDA, dtype=torch.bfloat16))

    def forward(self, x: Tensor, offs: Tensor) -> Tensor:
        return F.grouped_mm(x, self.weight.transpose(-2, -1), offs=offs)


def inputs(*ends: int, rows: int = 0, k: int = 256) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows or ends[-1], k, device=CUDA, dtype=torch.bfloat16)
    return x, torch.tensor(ends, device=CUDA, dtype=torch.int32)


@recipes
@pytest.mark.parametrize("ends", [(64, 128, 192, 256), (5, 5, 20, 37), (0, 0, 0, 1), (100, 100, 100, 100)])
def test_tensor_cores_are_the_simulation(ends: tuple[int, ...], recipe: str) -> None:
    (x, offs), model = inputs(*ends, rows=ends[-1] + 3), Experts()
    b = model.weight.detach().transpose(-2, -1)
    real, simulated = (
        grouped.op(recipe)(x, b, offs, executor=executor)[: ends[-1]] for executor in ("scaled_mm", "simulated")
    )
    assert sqnr(simulated, real) > 45  # bfloat16's rounding


@recipes
def test_rows_that_are_nobodys_touch_no_other(recipe: str) -> None:
    (x, offs), model = inputs(5, 5, 20, 34, rows=37), Experts()
    b = model.weight.detach().transpose(-2, -1)
    expected = grouped.op(recipe)(x, b, offs)[:34]
    x[34:] = torch.nan
    assert torch.equal(grouped.op(recipe)(x, b, offs)[:34], expected)


@recipes
def test_it_compiles_and_trains(recipe: str) -> None:
    (x, offs), model = inputs(100, 100, 300, 512), Experts()
    backend = fp8fx.Backend(Config(recipe=recipe, profit="always"))
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    grad = torch.randn(512, 384, device=CUDA, dtype=torch.bfloat16)
    y, exact = compiled(x.requires_grad_(), offs), model(x, offs)
    mine, theirs = (torch.autograd.grad(out, (x, model.weight), grad) for out in (y, exact))
    (row,) = backend.reports[0].rewritten
    assert (row.executor, row.gemms) == ("scaled_mm", ("forward",))
    assert 25 < sqnr(exact, y) < 35
    assert all(sqnr(a, b) > 45 for a, b in zip(theirs, mine, strict=True))


def test_auto_leaves_what_is_not_measured() -> None:
    (x, offs), model = inputs(64, 128, 192, 256), Experts()
    report = fp8fx.Backend(Config()).explain(model, x, offs)
    (row,) = report.refused
    assert row.reason is not None and row.reason.startswith(
        "FP8 is not worth it: the weights of all experts would be quantized"
    )


@recipes
@torch.no_grad()
def test_a_frozen_weight_is_the_one_quantized_at_each_call(recipe: str) -> None:
    (x, offs), model = inputs(100, 100, 300, 512), Experts()
    backend = fp8fx.Backend(Config(recipe=recipe, profit="always", freeze=True))
    y = torch.compile(model, backend=backend)(x, offs)
    assert torch.equal(y, torch.compile(grouped.op(recipe))(x, model.weight.transpose(-2, -1), offs))
