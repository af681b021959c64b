"""Which frozen linears become one GEMM, and what of its result has to be copied."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fp8fx
from fp8fx.executors import hardware
from fp8fx.graph.facts import Facts
from fp8fx.graph.values import attribute
from fp8fx.ops.fp8_weight import FP8Weight
from fp8fx.passes.rewrite import check, decide, freeze, match, merge, replace
from fp8fx.pipeline import Rewrite
from fp8fx.profit import weighing
from fp8fx.recipes.quantize import sqnr
from fp8fx.weights.store import STORE
from fp8fx.weights.strides import columns_to_copy
from tests.support.capture import after, ops

PASSES = (match, check, decide, replace, merge, freeze)


class Siblings(nn.Module):
    """Three linears of their own widths, and a function of them as its forward."""

    def __init__(self, function: Callable[[Siblings, Tensor], Any], k_amax: float = 1.0) -> None:
        super().__init__()
        self.function = function
        self.q, self.k, self.v = nn.Linear(16, 32), nn.Linear(16, 48, bias=False), nn.Linear(16, 64)
        self.addend = nn.Parameter(torch.randn(64))
        self.requires_grad_(False)
        for layer, amax in ((self.q, 1.0), (self.k, k_amax), (self.v, 1.0)):
            layer.weight.mul_(amax / layer.weight.abs().amax())

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def pointwise(p: Siblings, x: Tensor) -> tuple[Tensor, ...]:
    return p.q(x) * 2, p.k(x) * 2, p.v(x) * 2


def changed(p: Siblings, x: Tensor) -> tuple[Tensor, ...]:
    h = x * 1
    q, k = p.q(h) * 2, p.k(h) * 2
    h.add_(1)
    return q, k, p.v(h) * 2


def twice(p: Siblings, x: Tensor) -> tuple[Tensor, ...]:
    return p.q(x) * 2, p.q(x) * 3, p.k(x) * 2, p.v(x) * 2


def own_biases(p: Siblings, x: Tensor) -> tuple[Tensor, ...]:
    """One that the call gives, an addend that is no bias and may come from anywhere, and one that the graph writes."""
    p.q.bias.add_(1)
    given, added = F.linear(x, p.v.weight, x.sum() * p.addend), torch.addmm(x.repeat(1, 3), x, p.k.weight.t())
    return given * 2, added * 2, p.q(x) * 2, F.linear(x, p.v.weight[:8]) * 2


def seen_otherwise(p: Siblings, x: Tensor) -> tuple[Tensor, ...]:
    """Einsums, of which two see their input in the same way, and one otherwise than a linear does: K could be
    broadcast."""
    h = x.t()
    alike = [torch.einsum("kb,nk->bn", h, weight) * 2 for weight in (p.k.weight, p.v.weight)]
    return *alike, torch.einsum("bk,nk->nb", x, p.v.weight[:8]) * 2, p.q(x) * 2


CASES: dict[str, tuple[Callable[[Siblings, Tensor], Any], float, dict[str, Any], list[int]]] = {
    "one group": (pointwise, 1.0, {}, [144] * 3),
    "amaxes 100x apart, a scale a tensor": (pointwise, 100.0, {}, [32, 48, 64]),
    "amaxes 100x apart, a scale a row": (pointwise, 100.0, {"recipe": "rowwise"}, [144] * 3),
    "the input is changed between them": (changed, 1.0, {}, [80, 80, 64]),
    "a weight is read twice": (twice, 1.0, {}, [32, 32, 112, 112]),
    "one is excluded": (pointwise, 1.0, {"exclude": "k"}, [96, 96]),
    "biases": (own_biases, 1.0, {}, [64, 56, 32, 56]),
    "einsums": (seen_otherwise, 1.0, {}, [112, 112, 8, 32]),
}


@pytest.mark.parametrize("case", CASES)
def test_each_is_weighed_as_the_gemm_that_it_becomes(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weighed, choose = [], weighing.choose

    def spy(linear: Any, *others: Any) -> Any:
        weighed.append(linear.n)
        return choose(linear, *others)

    monkeypatch.setattr(hardware, "has_fp8_tensor_cores", lambda device: True)
    monkeypatch.setattr(weighing, "choose", spy)
    function, amax, options, widths = CASES[case]
    rewrite = after(PASSES, Siblings(function, amax), (torch.randn(4, 16),), freeze=True, profit="always", **options)
    becomes = [rewrite.gm.get_parameter(rewrite.ops[m.node].args[1].args[0].target).shape[0] for m in rewrite.matches]
    assert weighed == becomes == widths


@pytest.mark.compiles
def test_a_graph_merges_what_another_has_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of few rows copies cost less than one GEMM saves, of many more; the weights are held once."""
    apart, parts = lambda p, x: (p.q(x), p.v(x)), lambda p, x: tuple(F.linear(x, w) for w in p.v.weight.chunk(2))
    orders = ((2, 9, 1, "one GEMM with"), (9, 2, 2, "another graph has frozen them apart"))
    for function, (first, second, entries, remark) in itertools.product((apart, parts), orders):
        model = Siblings(function)
        monkeypatch.setattr(weighing.Weighing, "should_merge", lambda self, group, columns_to_copy: group[0].m < 5)
        backend = fp8fx.Backend(fp8fx.Config(freeze=True, profit="always"))
        call = torch.compile(model, backend=backend, dynamic=False)
        with torch.no_grad():
            for rows in (first, second):
                x = torch.randn(rows, 16)
                assert all(sqnr(expected, out) > 20 for out, expected in zip(call(x), model(x), strict=True))
        report = backend.reports[-1]
        assert all(remark in row.remark for row in report.rows)
        weights = [entry for entry in STORE.entries(model.parameters()) if entry.frozen.gemm is not None]
        assert len(weights) == entries


def test_no_view_of_the_input_is_left_over() -> None:
    def heads(p: Siblings, x: Tensor) -> tuple[Tensor, ...]:
        h = x.view(-1, 2, 2, 8)
        return tuple(torch.einsum("bhsd,hdk->bsk", h, w.view(2, 8, -1)) * 2 for w in (p.q.weight.t(), p.k.weight.t()))

    model, x = Siblings(lambda p, x: heads(p, x)), torch.randn(4, 32)
    gm = fp8fx.convert(fx.symbolic_trace(model), (x,), freeze=True, profit="always")
    read = [attribute(gm, str(node.target)) for node in gm.graph.find_nodes(op="get_attr")]
    assert sum(isinstance(x, FP8Weight) for x in read) == 1
    assert all(node.users or node.op in ("output", "placeholder") for node in gm.graph.nodes)


READERS: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "pointwise": (lambda y: y * 2, 0),
    "heads": (lambda y: y.view(4, 3, 16).transpose(0, 1) * 2, 0),
    "rows joined": (lambda y: y.view(-1) * 2, 48),
    "strides": (lambda y: torch.as_strided(y, (4, 16), (48, 1)) * 2, 48),
    "the output": (lambda y: y, 48),
    "a view, which is the output": (lambda y: y.view(4, 3, 16), 48),
}


@pytest.mark.parametrize("reader", READERS)
def test_the_columns_that_are_columns_to_copy(reader: str) -> None:
    function, expected = READERS[reader]
    model, x = Siblings(lambda p, x: (p.q(x) * 2, function(p.k(x)))), (torch.randn(4, 16),)
    decided = after(PASSES[:3], model, x, freeze=True)
    (group,) = decided.siblings
    assert columns_to_copy(group, Facts(decided.gm, x).writes) == expected
    copies = ops(after(PASSES, model, x, freeze=True).gm.graph)["clone"]
    assert copies == (expected > 0)
    decided = after(PASSES[:3], model, freeze=True)
    (unknown,) = decided.siblings
    assert columns_to_copy(unknown, Facts(decided.gm).writes) == 32 + 48  # whatever may follow


@pytest.mark.parametrize("rows", [4, 65536])
@pytest.mark.parametrize("outputs", [False, True])
def test_results_whose_copies_take_longer_than_the_merged_gemm_saves_stay_apart(
    outputs: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "has_fp8_tensor_cores", lambda device: True)
    model = Siblings((lambda p, x: (p.q(x), p.k(x), p.v(x))) if outputs else pointwise)
    rewrite = after(PASSES, model, (torch.randn(rows, 16),), recipe="rowwise", freeze=True, profit="always")
    apart = outputs and rows == 65536
    assert len(set(rewrite.ops.values())) == (3 if apart else 1)
    reason = "not merged with its siblings: copies of their results would take longer"
    assert [reason in map(str, rewrite.remarks.get(m.node, [])) for m in rewrite.matches] == [apart] * 3


def test_without_tensor_cores_siblings_are_merged_at_any_number_of_rows() -> None:
    model, x = Siblings(lambda p, x: (p.q(x), p.k(x), p.v(x))), torch.randn(65536, 16)
    assert len(set(after(PASSES, model, (x,), freeze=True).ops.values())) == 1


def test_siblings_are_left_in_high_precision_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "has_fp8_tensor_cores", lambda device: True)
    rewrite: Rewrite = after(PASSES, Siblings(pointwise), (torch.randn(4, 16),), freeze=True)
    assert (rewrite.matches, len(rewrite.refusals)) == ([], 3)
    assert [(result.name, result.count) for result in rewrite.results[2:]] == [
        ("decide", 3),
        ("replace", 0),
        ("merge", 0),
        ("freeze", 0),
    ]


def test_a_bias_that_is_trained_keeps_its_linear_apart() -> None:
    model = Siblings(lambda p, x: (p.q(x) * 2, p.k(x) * 2, p.v(x) * 2))
    model.q.bias.requires_grad_(True)
    trained = fp8fx.convert(model, freeze=True)
    assert ["one GEMM" in row.remark for row in trained.meta["fp8fx_report"].rows] == [False, True, True]
    trained(torch.randn(4, 16))[0].sum().backward()
    assert torch.equal(model.q.bias.grad, torch.full((32,), 8.0))  # type: ignore[arg-type]
    with torch.no_grad():
        served = fp8fx.convert(model, freeze=True)
    assert ["one GEMM" in row.remark for row in served.meta["fp8fx_report"].rows] == [True, True, True]
