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
from torch._dynamo.backends.common import aot_autograd

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
    models[0].load_state_dict(models[1].state_dict())
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
    assert set(gm.state_dict()) == {"w", "w_scale"} and gm.get_parameter("w") is not model.w
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
    with pytest.raises(FreezeError, match="nothing is frozen beside this model"):
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


class Cache(nn.Module):
    """Writes what a linear gives into a buffer, and its own counter, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.out = nn.Linear(64, 64), nn.Linear(64, 64)
        self.register_buffer("keys", torch.zeros(8, 64))
        self.register_buffer("length", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.keys.index_copy_(0, torch.arange(len(x)) + self.length, self.key(x))
        self.length.add_(len(x))
        return self.out(x)


def test_what_a_graph_of_fp8_weights_writes_in_place_stays(uncompiled: None) -> None:
    """Methods such as add_, whose result nothing reads."""
    model, x = Cache().requires_grad_(False), torch.randn(3, 64)
    fp8fx.freeze(model)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend="fp8")
    for _ in range(2):
        assert torch.equal(compiled(x), eager(x))
    assert int(model.length) == 6
    assert torch.equal(model.keys, eager.keys)


class Siblings(nn.Module):
    """Two linears of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(64, 64, bias=False), nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.q(x), self.k(x)


def test_siblings_side_by_side_have_fixed_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """AOTAutograd would make symbols of the sizes of what Dynamo did not trace."""
    shapes: list[torch.Size] = []

    def record(gm: fx.GraphModule, inputs: Any) -> fx.GraphModule:
        shapes.extend(node.meta["val"].shape for node in gm.graph.find_nodes(op="placeholder"))
        return gm

    backend = aot_autograd(fw_compiler=record)
    monkeypatch.setattr("fp8fx.lowering.compile_fx", lambda gm, inputs, *inner, config_patches: backend(gm, inputs))
    model = Siblings().requires_grad_(False)
    fp8fx.freeze(model)
    with torch.no_grad():
        torch.compile(model, backend="fp8")(torch.randn(4, 64))
    assert sorted(tuple(shape) for shape in shapes) == [(4, 64), (96, 1), (96, 64)]
    assert all(type(size) is int for shape in shapes for size in shape)
