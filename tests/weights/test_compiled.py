"""A compiled model with frozen weights: graphs, models and layers each have their own, and share what they can."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo import config as dynamo_config

import fp8fx
from fp8fx.errors import FreezeError
from fp8fx.recipes.quantize import quantize
from fp8fx.recipes.recipe import GLOBAL
from fp8fx.weights.store import STORE
from tests.support.freezing import Model, error, frozen
from tests.support.frozen_models import Breaking, Layer, Tied, compiled


@pytest.mark.compiles
def test_graphs_share_what_is_frozen_and_it_goes_with_the_model() -> None:
    model = Model()
    call = compiled(model)
    call(torch.randn(4, 64))
    entries = STORE.entries(model.parameters())
    call(torch.randn(7, 64))
    assert STORE.entries(model.parameters()) == entries
    assert {one.frozen.sources for one in entries} == {
        ("q.weight", "k.weight"),
        ("q.bias",),
        ("weight",),
        ("out.weight",),
    }
    before = len(STORE._entries)
    del model, call, entries
    torch._dynamo.reset()
    gc.collect()
    assert len(STORE._entries) <= before - 4


@pytest.mark.compiles
def test_two_models_and_two_recipes_in_one_process() -> None:
    x, models = torch.randn(4, 64), [Model(), Model()]
    calls = [compiled(model, recipe) for model in models for recipe in ("global", "rowwise")]
    results = [call(x) for call in calls]
    fp8fx.refresh(models[0], models[1].state_dict())
    again = [call(x) for call in calls]
    for i in (0, 1):
        assert error(again[i], results[i + 2]) < 1e-5
        assert torch.equal(again[i + 2], results[i + 2])


@pytest.mark.compiles
def test_autocast_freezes_what_the_op_would_have_cast() -> None:
    model, x = nn.Linear(64, 48).requires_grad_(False), torch.randn(5, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compiled(model)(x)
    (entry,) = STORE.entries(model.parameters())
    expected = quantize(model.weight.bfloat16(), GLOBAL.forward.rhs, 64) if GLOBAL.forward else None
    assert expected is not None
    assert torch.equal(entry.buffers[0].float(), expected.data.float())
    assert torch.equal(entry.buffers[1], torch.as_tensor(expected.scale))


@pytest.mark.parametrize("way", ["siblings", "parts"])
def test_autocast_to_another_dtype_than_the_weights(way: str) -> None:
    """It takes no part in what is done to weights before a call; to put float16 side by side it has no rule where it
    casts to bfloat16."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = (nn.Linear(64, 64, dtype=torch.float16).requires_grad_(False) for _ in range(2))

        def forward(self, x: Tensor) -> Any:
            if way == "siblings":
                return self.q(x), self.k(x)
            return F.linear(x, self.q.weight[:32]), F.linear(x, self.q.weight[32:])

    model, x = Two(), torch.randn(5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        gm = fp8fx.convert(model, (x,), freeze=True, recipe="rowwise")
        assert [row.remark[:12] for row in gm.meta["fp8fx_report"].rewritten] == ["one GEMM with"[:12]] * 2
        for found, expected in zip(gm(x), fp8fx.convert(model, (x,), recipe="rowwise")(x), strict=True):
            assert found.dtype == expected.dtype == torch.bfloat16
            assert error(found, expected) < 1e-2


@pytest.mark.compiles
def test_a_model_of_the_same_class_gets_its_own_weights() -> None:
    """Dynamo calls a graph with the parameters of another model of the same class."""
    x, models = torch.randn(4, 64), [Model(), Model()]
    for model in models:
        assert error(compiled(model)(x), frozen(model)(x)) < 1e-5


@pytest.mark.compiles
def test_more_blocks_than_dynamo_compiles_one_function_for() -> None:
    x, blocks = torch.randn(4, 64), [Model() for _ in range(10)]
    with dynamo_config.patch(fail_on_recompile_limit_hit=True), torch.no_grad():
        for block in blocks:
            block.compile(backend="fp8", options={"recipe": "global", "freeze": True})
        for block in blocks:
            assert error(block(x), frozen(block)(x)) < 1e-5


def test_functional_weights_freeze_too() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(48, 64), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, weight=self.w) + x @ self.w.t()

    model, x = Functional(), torch.randn(5, 64)
    gm = frozen(model, "rowwise")
    assert "w" not in gm.state_dict()
    assert torch.equal(gm(x), fp8fx.convert(fx.symbolic_trace(model), recipe="rowwise")(x))


@pytest.mark.usefixtures("uncompiled")
def test_layers_compiled_one_by_one_or_between_graph_breaks_have_their_own_weights() -> None:
    x, whole, regional = torch.randn(4, 64), Breaking(), Breaking()
    call = compiled(whole)
    for layer in regional.layers:
        layer.compile(backend="fp8", options={"recipe": "global", "freeze": True})
    for model, run in ((whole, call), (regional, regional)):
        expected = x
        for layer in model.layers:
            expected = frozen(copy.deepcopy(layer))(expected) if model is whole else frozen(copy_of(layer))(expected)
        assert torch.equal(run(x), expected)


def copy_of(layer: Layer) -> Layer:
    """The layer without what compiled it."""
    new = Layer().requires_grad_(False)
    new.load_state_dict(layer.state_dict())
    return new


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("how", ["attribute", "load_state_dict(assign=True)"])
def test_a_parameter_that_takes_anothers_place_is_seen(how: str) -> None:
    model, other, x = Model(), Model(), torch.randn(4, 64)
    call = compiled(model)
    call(x)
    if how == "attribute":
        model.out.weight = other.out.weight
    else:
        model.load_state_dict(other.state_dict(), assign=True)
        model.requires_grad_(False)
    assert torch.equal(call(x), frozen(model)(x))


def test_explain_freezes_nothing() -> None:
    model, x = Tied(), torch.randint(48, (3, 5))
    fp8fx.Backend(fp8fx.Config(freeze=True)).explain(model, x)
    assert STORE.entries(model.parameters()) == []
    with pytest.raises(FreezeError, match="nothing of this model is frozen"):
        fp8fx.refresh(model)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("freeze", [False, True])
def test_a_model_that_reads_a_buffer_in_python_is_traced_still(freeze: bool) -> None:
    class Looping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 64)
            self.register_buffer("steps", torch.tensor([0.5, 2.0, 1.0]))
            self.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            for i in range(self.steps.shape[0]):
                x = torch.relu(self.fc(x)) * float(self.steps[i])
            return x

    model, x = Looping(), torch.randn(4, 64)
    assert error(fp8fx.convert(model, freeze=freeze)(x), model(x)) < 0.1
