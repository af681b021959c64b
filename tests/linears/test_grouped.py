"""Grouped matmuls and batches of weights become the grouped ops; those that do not have a reason."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fp8fx
from fp8fx.config import Config
from fp8fx.errors import ShapeError
from fp8fx.executors.scaled_mm import ScaledMM
from fp8fx.executors.simulated import Simulated
from fp8fx.ops import grouped_mm as grouped
from fp8fx.profit import weighing
from fp8fx.recipes.quantize import quantize, quantize_experts
from fp8fx.recipes.recipe import RECIPES
from tests.support.capture import ops
from tests.support.experts import OFFS, ROWS, Batched, Experts, K, N, operands, recipes, rewritten


@recipes
def test_a_grouped_matmul_becomes_the_op(recipe: str) -> None:
    model, x = Experts(), operands()[0]
    after, report = rewritten(model, x, OFFS, recipe=recipe)
    assert ops(after.graph)[grouped.op(recipe)] == 1
    assert torch._grouped_mm not in ops(after.graph)
    (row,) = report.rewritten
    assert (row.form, row.op, row.gemms, row.m, row.k, row.n) == (
        *("grouped_mm", f"grouped_mm_fp8_{recipe}", ("forward",)),
        *(str(ROWS), str(K), str(N)),
    )
    assert row.flops == 2 * ROWS * K * N
    (y,) = after(
        *[
            {"x": x, "offs": OFFS}.get(n.target.strip("L_").rstrip("_"), model.weight)
            for n in after.graph.find_nodes(op="placeholder")
        ]
    )
    assert torch.equal(y[:34], grouped.op(recipe)(x, model.weight.transpose(-2, -1), OFFS)[:34])


@pytest.mark.compiles
@recipes
def test_it_compiles_and_trains_to_the_same_bits(recipe: str) -> None:
    model, x = Experts(), operands()[0]
    compiled = torch.compile(model, backend=fp8fx.Backend(Config(recipe=recipe)), fullgraph=True)
    found = []
    for call in (compiled, lambda x, offs: grouped.op(recipe)(x, model.weight.transpose(-2, -1), offs)):
        y = call(x, OFFS)[:34]
        found.append((y, *torch.autograd.grad(y.float().square().sum(), model.weight)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_an_exported_one_too() -> None:
    model, x = Experts(), operands()[0]
    gm = fp8fx.convert(torch.export.export(model, (x, OFFS)))
    assert torch.equal(gm(x, OFFS)[:34], grouped.op("mixed")(x, model.weight.transpose(-2, -1), OFFS)[:34])


@torch.no_grad()
def test_on_tensor_cores_auto_takes_frozen_experts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weighing, "resolve", lambda executor, device, groups=False: ScaledMM())
    model, x = Experts(k=4096, n=4096), torch.randn(ROWS, 4096, dtype=torch.bfloat16)
    for frozen in (False, True):
        backend = fp8fx.Backend(Config(freeze=frozen))
        (row,) = backend.explain(model, x, OFFS).rows
        if frozen:
            assert row.remark.startswith("predicted: forward 1.")
        else:
            assert row.reason is not None and row.reason.startswith("FP8 is not worth it: the weights of all experts")
    (row,) = fp8fx.Backend(Config(profit="always")).explain(model, x, OFFS).rows
    assert row.reason is None


class Weighted(Experts):
    def forward(self, x: Tensor, offs: Tensor) -> Tensor:
        return F.grouped_mm(x, (self.weight * 2).transpose(-2, -1), offs=offs)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: Experts(k=40, n=48), "a weight for each of several experts, and K=40, N=48 not both multiples of 16"),
        (Weighted, "the weight is computed, not a parameter, a buffer, a constant or a view of one"),
    ],
)
def test_refusals(model: Any, reason: str) -> None:
    model = model()
    x = torch.randn(ROWS, model.weight.shape[-1], dtype=torch.bfloat16)
    with torch.no_grad():
        after, report = rewritten(model, x, OFFS)
    assert [row.reason for row in report.refused] == [reason]
    assert ops(after.graph)[torch._grouped_mm] == 1


def test_profit_never_and_exclude() -> None:
    for options, reason in (
        ({"profit": "never"}, "profit='never'"),
        ({"exclude": ("weight",)}, "excluded by 'weight'"),
    ):
        _, report = rewritten(Experts(), operands()[0], OFFS, **options)
        assert [row.reason for row in report.refused] == [reason]


class BatchedByBmm(Experts):
    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.weight.mT)


@pytest.mark.compiles
@recipes
@pytest.mark.parametrize("kind", [Batched, BatchedByBmm])
@pytest.mark.parametrize("m", [7, 1, 0])
def test_a_batch_of_weights_is_a_grouped_matmul_of_equal_groups(recipe: str, kind: type[Experts], m: int) -> None:
    model, x = kind(), torch.randn(len(OFFS), m, K, dtype=torch.bfloat16)
    backend = fp8fx.Backend(Config(recipe=recipe))
    y = torch.compile(model, backend=backend, fullgraph=True)(x)
    (row,) = backend.reports[0].rewritten
    assert row.op == f"grouped_mm_fp8_{recipe}"
    offs = torch.arange(1, len(OFFS) + 1, dtype=torch.int32) * m
    expected = grouped.op(recipe)(x.reshape(-1, K), model.weight.transpose(-2, -1), offs)
    assert torch.equal(y, expected.view(len(OFFS), m, N))


@torch.no_grad()
def test_a_batch_runs_on_another_device_than_it_was_converted_on() -> None:
    model, x = Batched(), torch.randn(len(OFFS), 7, K, dtype=torch.bfloat16)
    expected, values = fp8fx.convert(fx.symbolic_trace(model), (x,))(x), copy.deepcopy(model.state_dict())
    gm = fp8fx.convert(fx.symbolic_trace(model.to("meta")), (x.to("meta"),))
    assert gm(x.to("meta")).device.type == "meta"
    gm.to_empty(device="cpu").load_state_dict(values)
    assert torch.equal(gm(x), expected)
    graph = fx.Tracer().trace(gm)  # as unpickling does
    assert torch.equal(fx.GraphModule(gm, graph)(x), expected)


@pytest.mark.compiles
def test_a_batch_of_any_size_is_one_compilation() -> None:
    model, backend = Batched(), fp8fx.Backend(Config())
    compiled = torch.compile(model, backend=backend, dynamic=True)
    for m in (5, 9, 33):
        x = torch.randn(len(OFFS), m, K, dtype=torch.bfloat16)
        assert torch.equal(
            compiled(x),
            grouped.op("mixed")(x.view(-1, K), model.weight.mT, OFFS.new_tensor([1, 2, 3, 4]) * m).view(4, m, N),
        )
    assert len(backend.reports) == 1


@pytest.mark.compiles
def test_a_batch_under_autocast() -> None:
    model, x = Batched().float(), torch.randn(len(OFFS), 7, K)
    backend = fp8fx.Backend(Config())
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.compile(model, backend=backend)(x)
    assert len(backend.reports[0].rewritten) == 1
    expected = grouped.op("mixed")(
        x.bfloat16().view(-1, K), model.weight.bfloat16().mT, OFFS.new_tensor([7, 14, 21, 28])
    )
    assert torch.equal(y, expected.view(4, 7, N))


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("kind", [Batched, BatchedByBmm])
@torch.no_grad()
def test_a_batch_that_autocast_makes_another_dtype_is_multiplied_in_that(kind: type[Experts], freeze: bool) -> None:
    model, x = kind(), torch.randn(len(OFFS), 7, K, dtype=torch.bfloat16)
    w = model.weight
    if freeze:
        q = quantize_experts(w, RECIPES["mixed"].forward.rhs, quantize)  # type: ignore[union-attr]
        w = q.data.float() * q.scale.unsqueeze(-1)  # type: ignore[union-attr]
    gm = fp8fx.convert(model, (x,), freeze=freeze)
    assert len(gm.meta["fp8fx_report"].rewritten) == 1
    for value in (x, x.float()):
        with torch.autocast("cpu", torch.float16):
            y = gm(value)
        assert y.dtype == torch.float16
        assert torch.equal(y, value.half() @ w.half().mT)


def test_a_batch_in_float32_is_left() -> None:
    _, report = rewritten(Batched().float(), torch.randn(len(OFFS), 7, K))
    assert [row.reason for row in report.refused] == ["a weight for each of several experts, and not in bfloat16"]


def test_a_batch_of_another_size_than_traced_is_what_it_is_for_matmul() -> None:
    model = Batched()
    gm = fp8fx.convert(fx.symbolic_trace(model), (torch.randn(4, 8, K, dtype=torch.bfloat16),))
    x = torch.randn(1, 8, K, dtype=torch.bfloat16)
    assert gm(x).shape == model(x).shape == (4, 8, N)
    with pytest.raises(ShapeError, match=r"expected \(E, M, K\) and \(E, K, N\)"):
        gm(torch.randn(2, 8, K, dtype=torch.bfloat16))


def test_a_weight_expanded_over_a_batch_is_no_experts() -> None:
    class Expanded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(K, N, dtype=torch.bfloat16))

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(x, self.weight.expand(4, K, N))

    _, report = rewritten(Expanded(), torch.randn(4, 7, K, dtype=torch.bfloat16))
    assert [row.reason for row in report.refused] == ["the weight is expanded over a batch"]


@torch.no_grad()
def test_a_device_without_grouped_tensor_cores_is_not_asked_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        weighing, "resolve", lambda executor, device, groups=False: Simulated() if groups else ScaledMM()
    )
    for options in ({}, {"freeze": True}):
        (row,) = fp8fx.Backend(Config(**options)).explain(Experts(), operands()[0], OFFS).rows
        assert row.reason == "FP8 is not worth it: tensor cores multiply groups in FP8 on compute capability 9.0 alone"
