"""options={"freeze": True}: what a graph reads is made of the parameters that the call gives it, as they are then."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import fp8fx
from fp8fx.errors import FreezeError
from fp8fx.weights.store import STORE
from tests.support.freezing import Model, error, frozen
from tests.support.frozen_models import Tied, compiled

recipes = pytest.mark.parametrize("recipe", ["mixed", "global", "rowwise"])
eagerly = pytest.mark.usefixtures("uncompiled")


def weights_of(model: Model) -> list[nn.Parameter]:
    return [model.q.weight, model.k.weight, model.weight, model.out.weight]


# Equal blocks.


@eagerly
@recipes
def test_equal_blocks_share_a_graph(recipe: str) -> None:
    counters.clear()
    blocks, x = [Model() for _ in range(12)], torch.randn(4, 64)
    for block in blocks:
        block.compile(backend="fp8", options={"recipe": recipe, "freeze": True})
    for block in blocks:
        assert error(block(x), frozen(block, recipe)(x)) < 1e-6
    assert counters["stats"]["unique_graphs"] == 1


@eagerly
def test_many_blocks_through_one_function_share_a_graph() -> None:
    def step(block: nn.Module, x: Tensor) -> Tensor:
        return block(x)

    counters.clear()
    blocks, x = [nn.Linear(64, 64).requires_grad_(False) for _ in range(12)], torch.randn(4, 64)
    call: Any = torch.compile(step, backend="fp8", options={"recipe": "global", "freeze": True}, fullgraph=True)
    for block in blocks:
        assert torch.equal(call(block, x), frozen(block)(x))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.compiles
def test_a_model_has_one_copy_however_many_graphs_read_it() -> None:
    model = Model()
    call = torch.compile(model, backend="fp8", dynamic=False, options={"freeze": True})
    for rows in (4, 5, 6):
        x = torch.randn(rows, 64)
        assert error(call(x), frozen(model, "mixed")(x)) < 1e-5
    entries = STORE.entries(model.parameters())
    assert len([entry for entry in entries if entry.frozen.gemm is not None]) == 3  # q and k are one


@eagerly
def test_what_is_frozen_goes_with_the_model() -> None:
    model, x = Model(), torch.randn(4, 64)
    gc.collect()
    before = len(STORE._entries)
    call = compiled(model)
    call(x)
    assert len(STORE._entries) > before
    del model, call
    torch._dynamo.reset()
    gc.collect()
    assert len(STORE._entries) == before


@eagerly
def test_a_copy_of_the_model_has_weights_of_its_own() -> None:
    model, x = Model(), torch.randn(4, 64)
    call = compiled(model)
    y = call(x)
    other = copy.deepcopy(model)
    for weight in weights_of(other):
        weight.mul_(2)
    assert torch.equal(compiled(other)(x), frozen(other)(x))
    assert torch.equal(call(x), y)


# What is written is seen.


def _mul(model: Model) -> None:
    for weight in weights_of(model):
        weight.mul_(-2)


def _load(model: Model) -> None:
    model.load_state_dict({name: -2 * x for name, x in model.state_dict().items()})


def _assign(model: Model) -> None:
    model.load_state_dict({name: -2 * x for name, x in model.state_dict().items()}, assign=True)
    model.requires_grad_(False)


def _exchange(model: Model) -> None:
    model.q.weight = nn.Parameter(-2 * model.q.weight, requires_grad=False)


def _set_data(model: Model) -> None:
    for weight in weights_of(model):
        weight.data = -2 * weight.data


def _from_a_vector(model: Model) -> None:
    vector_to_parameters(-2 * parameters_to_vector(model.parameters()), model.parameters())


def _step(model: Model) -> None:
    for weight in weights_of(model):
        weight.grad = weight * 3
    torch.optim.SGD(weights_of(model), lr=1).step()


@eagerly
@recipes
@pytest.mark.parametrize("write", [_mul, _load, _assign, _exchange, _set_data, _from_a_vector, _step])
def test_a_weight_that_has_changed_is_quantized_anew(write: Callable[[Model], None], recipe: str) -> None:
    model, x = Model(), torch.randn(4, 64)
    backend = fp8fx.Backend(fp8fx.Config(recipe=recipe, freeze=True))
    call = torch.compile(model, backend=backend)
    y = call(x)
    write(model)
    assert error(call(x), frozen(model, recipe)(x)) < 1e-6
    assert not torch.equal(call(x), y)
    assert len(backend.reports) == 1  # compiled once


def _scale_data(model: nn.Module) -> None:
    for p in model.parameters():
        p.data.mul_(-2)


def _in_inference_mode(model: nn.Module) -> None:
    with torch.inference_mode():
        for p in model.parameters():
            p.mul_(-2)


@eagerly
@pytest.mark.parametrize("write", [_scale_data, _in_inference_mode])
def test_a_write_that_leaves_no_trace_is_seen_by_the_next_compilation_and_after_a_refresh(
    write: Callable[[nn.Module], None],
) -> None:
    with torch.inference_mode(write is _in_inference_mode):
        model, x = Model(), torch.randn(4, 64)
        call = compiled(model)
        y = call(x)
        write(model)
        assert error(call(x), frozen(model)(x)) > 0.05  # not yet
        assert not torch.equal(call(x), y)  # the norm and the biases are no frozen weights
        fp8fx.refresh(call)
        assert torch.equal(call(x), frozen(model)(x))
        write(model)
        torch._dynamo.reset()
        assert torch.equal(compiled(model)(x), frozen(model)(x))


@eagerly
def test_a_graph_compiled_later_renews_those_of_all() -> None:
    model, x = Model(), torch.randn(4, 64)
    call = torch.compile(model, backend="fp8", dynamic=False, options={"recipe": "global", "freeze": True})
    call(x)
    _scale_data(model)
    assert torch.equal(call(x[:3]), frozen(model)(x[:3]))
    assert torch.equal(call(x), frozen(model)(x))


@eagerly
def test_a_weight_that_is_no_longer_finite_is_refused() -> None:
    model, x = Model(), torch.randn(4, 64)
    call = compiled(model)
    call(x)
    model.out.weight.fill_(torch.inf)
    with pytest.raises(FreezeError, match=r"out\.weight: inf or NaN"):
        call(x)


@eagerly
def test_a_tied_weight_takes_the_new_values_in_both_places() -> None:
    model, other, tokens = Tied(), Tied(), torch.randint(48, (3, 5))
    call = compiled(model)
    call(tokens)
    model.load_state_dict(other.state_dict())
    assert error(call(tokens), frozen(other)(tokens)) < 1e-6


class Plain(nn.Module):
    """A weight that is an attribute, no parameter and no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.randn(48, 64)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w)


@eagerly
def test_a_weight_that_is_an_attribute() -> None:
    model, x = Plain(), torch.randn(4, 64)
    call = compiled(model)
    call(x)
    model.w.mul_(-2)
    assert torch.equal(call(x), frozen(model)(x))
    fp8fx.refresh(model)
    assert torch.equal(call(x), frozen(model)(x))


@pytest.mark.compiles
@torch.no_grad()
def test_a_weight_that_the_graph_itself_writes_is_not_frozen() -> None:
    class Decaying(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.state = nn.Linear(32, 16), nn.Linear(16, 16, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y = self.state(self.fc(x))
            self.state.weight.mul_(-0.5)
            return y

    model, x = Decaying(), torch.randn(4, 32)
    expected = fp8fx.convert(torch.fx.symbolic_trace(copy.deepcopy(model)))
    call = torch.compile(model, backend="fp8", options={"freeze": True})
    for _ in range(3):
        torch.testing.assert_close(call(x), expected(x), rtol=1e-4, atol=1e-5)


@eagerly
def test_trained_weights_are_refused_when_a_frozen_model_is_called_in_grad_mode() -> None:
    model, x = Model().requires_grad_(), torch.randn(4, 64)
    call = compiled(model)
    with torch.no_grad():
        call(x)
    with pytest.raises(BackendCompilerFailed, match="requires grad in grad mode") as caught:
        call(x)
    assert isinstance(caught.value.inner_exception, FreezeError)
