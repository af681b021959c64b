"""Frozen weights of experts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fp8fx
from fp8fx.config import Config
from fp8fx.ops import grouped_mm as grouped
from fp8fx.weights.store import STORE
from tests.support.capture import Capture, ops
from tests.support.experts import OFFS, Batched, Experts, K, N, operands, recipes, rewritten


@pytest.mark.compiles
@recipes
@torch.no_grad()
def test_a_frozen_weight_is_the_one_quantized_at_each_call(recipe: str) -> None:
    model, x = Experts(), operands()[0]
    expected = grouped.op(recipe)(x, model.weight.transpose(-2, -1), OFFS)[:34]
    gm = fp8fx.convert(torch.export.export(model, (x, OFFS)), recipe=recipe, freeze=True)
    assert torch.equal(gm(x, OFFS)[:34], expected)
    held = list(gm.state_dict().values())
    assert sorted(str(t.dtype) for t in held) == ["torch.float32", "torch.float8_e4m3fn"]
    compiled = torch.compile(model, backend=fp8fx.Backend(Config(recipe=recipe, freeze=True)))
    assert torch.equal(compiled(x, OFFS)[:34], expected)


@torch.no_grad()
def test_frozen_experts_take_new_weights() -> None:
    model, x = Experts(), operands()[0]
    gm = fp8fx.convert(torch.export.export(model, (x, OFFS)), freeze=True)
    model.weight.mul_(3)
    gm.load_state_dict(model.state_dict())
    assert torch.equal(gm(x, OFFS)[:34], grouped.op("mixed")(x, model.weight.transpose(-2, -1), OFFS)[:34])


@torch.no_grad()
def test_frozen_experts_are_no_siblings() -> None:
    class Twice(Experts):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Parameter(torch.randn_like(self.weight))

        def forward(self, x: Tensor, offs: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x, offs), F.grouped_mm(x, self.other.mT, offs=offs)

    after, report = rewritten(Twice(), operands()[0], OFFS, freeze=True)
    assert ops(after.graph)[grouped.op("mixed")] == 2
    assert [row.remark for row in report.rewritten] == ["", ""]


@recipes
@torch.no_grad()
def test_a_frozen_batch_under_autocast_is_the_one_quantized_at_each_call(recipe: str) -> None:
    model, x, found = Batched().float(), torch.randn(len(OFFS), 7, K), []
    for freeze in (False, True):
        capture = Capture(Config(recipe=recipe, freeze=freeze))
        with torch.autocast("cpu", torch.bfloat16):
            found.append(torch.compile(model, backend=capture)(x))
        (row,) = capture.only.report.rewritten
        assert row.remark == ""
        held = [entry.buffers[0].dtype for entry in STORE.entries(model.parameters())]
        assert held == [torch.float8_e4m3fn] * freeze
    assert found[0].dtype == found[1].dtype == torch.bfloat16
    assert torch.equal(*found)


class Parts(Experts):
    """Two parts of one weight, each of two experts."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        first, second = self.weight[:2], self.weight[2:]
        return torch.bmm(x, first.mT), torch.bmm(x.relu(), second.mT)


class Flat(nn.Module):
    """Experts in a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4 * N, K, dtype=torch.bfloat16))

    def forward(self, x: Tensor, offs: Tensor) -> Tensor:
        return F.grouped_mm(x, self.weight.view(4, N, K).mT, offs=offs)


class Swapped(nn.Module):
    """Experts in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(N, 4, K, dtype=torch.bfloat16))

    def forward(self, x: Tensor, offs: Tensor) -> Tensor:
        return F.grouped_mm(x, self.weight.transpose(0, 1).mT, offs=offs)


@pytest.mark.compiles
@pytest.mark.parametrize("kind", [Parts, Flat, Swapped])
@torch.no_grad()
def test_experts_that_are_parts_or_views_of_a_parameter(kind: type[nn.Module]) -> None:
    model = kind()
    inputs = (torch.randn(2, 7, K, dtype=torch.bfloat16),) if kind is Parts else (operands()[0], OFFS)
    backend = fp8fx.Backend(Config(freeze=True))
    compiled = torch.compile(model, backend=backend)
    unfrozen = torch.compile(model, backend=fp8fx.Backend(Config(profit="always")))
    for factor in (1, -2):
        model.weight.mul_(factor)  # type: ignore[operator, union-attr]
        for y, expected in zip(*map(_parts_of, (compiled(*inputs), unfrozen(*inputs))), strict=True):
            assert torch.equal(y[:34], expected[:34])
    assert all(row.op == "grouped_mm_fp8_mixed" for row in backend.reports[0].rows)


def _parts_of(y: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (y,) if isinstance(y, Tensor) else y
