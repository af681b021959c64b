"""unwrap: what a graph reads of FP8 weights are their data and scales."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fp8fx import FP8Weight
from fp8fx.ops import grouped_mm as grouped
from fp8fx.ops.matmul import op
from fp8fx.passes.rewrite import PIPELINE
from fp8fx.pipeline import Rewrite
from fp8fx.reasons import WeightReason
from fp8fx.recipes.recipe import RECIPES
from fp8fx.weights.side_by_side import side_by_side
from tests.support.agreement import Lowered
from tests.support.capture import after, ops
from tests.support.numbers import error

aten = torch.ops.aten
recipes = pytest.mark.parametrize("recipe", sorted(RECIPES))


class Model(nn.Module):
    """FP8 weights, a plain one, and a function of them as its forward."""

    def __init__(self, function: Callable[[Any, Tensor], Any], recipe: str = "rowwise") -> None:
        super().__init__()
        self.function = function
        self.w, self.v = FP8Weight(torch.randn(48, 64), recipe), FP8Weight(torch.randn(32, 64), recipe)
        self.kn = FP8Weight(torch.randn(64, 64), recipe, transposed=True)
        self.plain = nn.Parameter(torch.randn(48, 64), requires_grad=False)
        self.b, self.c = (nn.Parameter(torch.randn(n), requires_grad=False) for n in (48, 32))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def unwrapped(model: nn.Module, *inputs: Any, **options: Any) -> tuple[Rewrite, Sequence[Any]]:
    """The rewrite of Dynamo's graph of the model, and what the graph is called with."""
    graphs: list[tuple[fx.GraphModule, Sequence[Any]]] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        graphs.append((gm, example_inputs))
        return gm.forward

    torch.compile(model, backend=backend, fullgraph=True)(*inputs)
    ((gm, example_inputs),) = graphs
    return after(PIPELINE, gm, example_inputs, **options), example_inputs


def reads(gm: fx.GraphModule) -> list[str]:
    """What is read of weights: the attribute's name, and of how many weights side by side."""
    found = []
    for node in gm.graph.nodes:
        if node.target is getattr and node.args[1] in ("qdata", "scale"):
            found.append(node.args[1])
        elif node.target is side_by_side:
            found.append(f"{node.args[0]} of {len(node.args) - 1}")
    return sorted(found)


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


FORMS: dict[str, tuple[Callable[[Any, Tensor], Any], list[str]]] = {
    "F.linear": (lambda p, x: F.linear(x, p.w, p.b), ["qdata", "scale"]),
    "@": (lambda p, x: x @ p.w.T, ["qdata", "scale"]),
    "a transposed weight": (lambda p, x: torch.addmm(p.b.repeat(2)[:64], x, p.kn), ["qdata", "scale"]),
    "a part": (lambda p, x: F.linear(x, p.w[8:40]), ["qdata", "scale"]),
    "two readers": (lambda p, x: F.linear(x, p.w) + F.linear(x.relu(), p.w), ["qdata", "scale"]),
    "siblings": (lambda p, x: (F.linear(x, p.w, p.b) * 2, F.linear(x, p.v) * 2), ["qdata of 2", "scale of 2"]),
    "no linear": (lambda p, x: x * p.w.sum(0), ["qdata", "scale"]),
    "both": (lambda p, x: F.linear(x, p.w) * p.w.sum(1), ["qdata", "scale"]),
    "a plain weight beside it": (lambda p, x: F.linear(x, p.w) + F.linear(x, p.plain), ["qdata", "scale"]),
}


@recipes
@pytest.mark.parametrize("form", FORMS)
def test_the_graph_reads_data_and_scales_and_computes_the_same(form: str, recipe: str) -> None:
    function, expected = FORMS[form]
    model, x = Model(function, recipe), torch.randn(4, 64)
    rewrite, inputs = unwrapped(model, x, recipe=recipe)
    if form == "siblings" and recipe == "global":
        expected = ["qdata of 2", "scale", "scale"]  # each its own scale
    assert reads(rewrite.gm) == expected
    for y, value in zip(flat(rewrite.gm(*inputs)), flat(model(x)), strict=True):
        assert error(y, value) < 0.03 if form == "a plain weight beside it" else error(y, value) < 1e-6
    read = {node for node in rewrite.gm.graph.nodes if node.target in (getattr, side_by_side)}
    for node, given in zip(rewrite.gm.graph.find_nodes(op="placeholder"), inputs, strict=True):
        assert not isinstance(given, FP8Weight) or node.users.keys() <= read  # nothing reads a weight otherwise


@recipes
def test_a_weight_that_is_read_the_other_way_round_is_dequantized(recipe: str) -> None:
    """A square one has the same shape then. Two of them are no siblings that could be merged."""

    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.v = (FP8Weight(torch.randn(64, 64), recipe) for _ in range(2))
            self.kn = FP8Weight(torch.randn(64, 64), recipe, transposed=True)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return x @ self.w.detach() * 2, x @ self.v.detach() * 2, x @ self.kn.T * 2, x @ self.kn * 2

    model, x = Square(), torch.randn(4, 64)
    rewrite, inputs = unwrapped(model, x)
    exact = x @ model.w.dequantize() * 2, x @ model.v.dequantize() * 2, x @ model.kn.dequantize().T * 2
    results = flat(rewrite.gm(*inputs))
    for y, eager, expected in zip(results, model(x), exact, strict=False):
        assert error(y, expected) < 1e-6
        assert error(eager, expected) < 1e-6
    assert error(results[3], model(x)[3]) < 1e-6
    assert [refusal.reason.kind for refusal in rewrite.refusals] == [WeightReason.FP8_ALONG_N] * 3


@recipes
def test_transposed_weights_do_not_lie_side_by_side(recipe: str) -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.v = (FP8Weight(torch.randn(64, 64), recipe, transposed=True) for _ in range(2))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x @ self.w.detach() * 2, x @ self.v.detach() * 2

    model, x = Transposed(), torch.randn(4, 64)
    rewrite, inputs = unwrapped(model, x)
    assert reads(rewrite.gm) == ["qdata", "qdata", "scale", "scale"]
    for y, expected in zip(rewrite.gm(*inputs), model(x), strict=True):
        assert error(y, expected) < 1e-6


def test_it_counts_weights_and_leaves_other_graphs_alone() -> None:
    rewrite, _ = unwrapped(Model(lambda p, x: F.linear(x, p.w) + F.linear(x.relu(), p.plain)), torch.randn(4, 64))
    result = rewrite.results[-1]
    assert (result.name, result.count, result.modified) == ("unwrap", 1, True)
    rewrite, _ = unwrapped(Model(lambda p, x: F.linear(x, p.plain)), torch.randn(4, 64))
    result = rewrite.results[-1]
    assert (result.name, result.count, result.modified) == ("unwrap", 0, False)


@recipes
def test_experts(recipe: str) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = FP8Weight(torch.randn(3, 32, 64).bfloat16(), recipe)

        def forward(self, x: Tensor, offs: Tensor) -> Tensor:
            return F.grouped_mm(x, self.w.mT, offs=offs)

    model, x, offs = Experts(), torch.randn(9, 64).bfloat16(), torch.tensor([2, 5, 9], dtype=torch.int32)
    rewrite, inputs = unwrapped(model, x, offs)
    (y,) = flat(rewrite.gm(*inputs))
    assert torch.equal(y, model(x, offs))
    assert ops(rewrite.gm.graph)[grouped.op(recipe)] == 1
    assert reads(rewrite.gm) == ["qdata", "scale"]


def test_what_is_written_in_place_stays() -> None:
    class Counting(Model):
        def forward(self, x: Tensor) -> Tensor:
            self.b.add_(1)
            return F.linear(x, self.w, self.b)

    model, x = Counting(lambda p, x: x), torch.randn(4, 64)
    rewrite, inputs = unwrapped(model, x)
    before = model.b.clone()
    rewrite.gm(*inputs)
    assert torch.equal(model.b, before + 1)


@pytest.mark.parametrize("written", [lambda p: p.w.zero_(), lambda p: p.w.copy_(p.plain)])
def test_a_weight_that_the_graph_itself_writes(written: Callable[[Any], Any]) -> None:
    def function(p: Any, x: Tensor) -> Tensor:
        y = F.linear(x, p.w)
        written(p)
        return y + F.linear(x, p.w)

    model, other = Model(function), Model(function)
    other.load_state_dict(model.state_dict())
    x = torch.randn(4, 64)
    assert error(torch.compile(model, backend=Lowered())(x), other(x)) < 1e-6
    assert torch.equal(model.w.dequantize(), other.w.dequantize())


def test_a_single_row_where_that_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fp8fx.executors.hardware.has_fp8_tensor_cores", lambda device: True)
    monkeypatch.setattr("fp8fx.profit.choice._is_weight_only", lambda *_: True)
    model = Model(lambda p, x: F.linear(x, p.w))
    rewrite, _ = unwrapped(model, torch.randn(1, 64))
    (node,) = rewrite.gm.graph.find_nodes(op="call_function", target=op("rowwise"))
    assert node.kwargs["weight_only"] is True
