"""A released model in other hands: read, swapped, saved, exported or run as it was written, it gives an error and never
a NaN."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fp8fx
from fp8fx.errors import FreezeError
from tests.support.freezing import Model, state_of
from tests.support.frozen_models import Breaking, Layer, compiled


@pytest.mark.slow
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("count", [3, 6])
def test_released_layers_compiled_one_by_one_never_run_on_nan(count: int) -> None:
    model, x = Breaking(count), torch.randn(4, 64)
    for layer in model.layers:
        layer.compile(backend="fp8", options={"recipe": "global", "freeze": True})
    expected = model(x)
    fp8fx.release(model)
    assert torch.equal(model(x), expected)


@pytest.fixture
def swapping() -> Iterator[None]:
    """Modules swap their parameters' contents where they are moved, cast and loaded, which torch refuses of one with a
    weak reference."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


@pytest.mark.usefixtures("uncompiled", "swapping")
@pytest.mark.parametrize("trained", [False, True])
def test_a_compiled_model_swaps_its_parameters(trained: bool) -> None:
    model, x = Model().requires_grad_(trained), torch.randn(4, 64)
    call, other = torch.compile(model, backend="fp8", options={"recipe": "global"}), Model()
    with torch.set_grad_enabled(trained):
        call(x)
        model.load_state_dict(other.state_dict())
        assert torch.equal(call(x), fp8fx.convert(other, recipe="global")(x))
        model.bfloat16()
        assert torch.equal(call(x.bfloat16()), fp8fx.convert(other.bfloat16(), recipe="global")(x.bfloat16()))


@pytest.mark.usefixtures("uncompiled", "swapping")
def test_a_frozen_weight_is_not_swapped() -> None:
    """Dynamo's own guard on its identity holds a weak reference, too."""
    model, x = nn.Linear(64, 48, bias=False).requires_grad_(False), torch.randn(4, 64)
    call, before = compiled(model), model.weight.clone()
    expected = call(x)
    with pytest.raises(RuntimeError, match="Couldn't swap"):
        model.bfloat16()
    assert torch.equal(model.weight, before)
    assert torch.equal(call(x), expected)
    with pytest.raises(RuntimeError, match="While swapping the parameter"):
        model.load_state_dict(nn.Linear(64, 48, bias=False).state_dict())


@pytest.mark.usefixtures("uncompiled")
def test_a_model_around_a_released_one_is_not_saved_either() -> None:
    model, x = Model(), torch.randn(4, 64)
    call = compiled(model)
    call(x)
    fp8fx.release(call)
    outer = nn.Sequential(nn.LayerNorm(64), model)
    with pytest.raises(FreezeError, match=r"1\.\w+.*nothing to save"):
        outer.state_dict()
    with pytest.raises(FreezeError, match="nowhere to load to"):
        outer.load_state_dict(nn.Sequential(nn.LayerNorm(64), Model()).state_dict())
    assert model.norm.state_dict().keys() == {"weight", "bias"}  # nothing of it is released


READS: dict[str, Callable[[Model], object]] = {
    "a call": lambda m: m(torch.randn(4, 64)),
    "a function": lambda m: F.linear(torch.randn(4, 64), m.q.weight),
    "an operator": lambda m: torch.randn(4, 64) @ m.q.weight.T,
    "its data": lambda m: m.q.weight.data,
    "a cast": lambda m: m.q.half(),
    "a device": lambda m: m.q.to("meta"),
    "a copy": copy.deepcopy,
    "a pickle": lambda m: torch.save(m.q, io.BytesIO()),
    "its values": lambda m: m.q.weight.tolist(),
    "a change": lambda m: m.q.weight.zero_(),
    "a state dict with its parameters": lambda m: m.state_dict(keep_vars=True),
}


@pytest.mark.slow
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("read", READS)
@torch.no_grad()
def test_whoever_reads_a_released_weight_gets_an_error(read: str) -> None:
    model, x = Model(), torch.randn(4, 64)
    call = compiled(model)
    expected = call(x)
    fp8fx.release(call)
    with pytest.raises(FreezeError, match=r"released.*fp8fx\.restore"):
        READS[read](model)
    assert torch.equal(call(x), expected)


@pytest.mark.slow
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("strict", [False, True])
def test_a_released_model_is_not_exported(strict: bool) -> None:
    model, x = Model(), torch.randn(4, 64)
    call = compiled(model)
    expected, state = call(x), state_of(model)
    fp8fx.release(call)
    for exported in (model, call):
        with pytest.raises(FreezeError, match=r"released is (exported|read by _is_view)"):
            torch.export.export(exported, (x,), strict=strict)
    assert torch.equal(call(x), expected)
    fp8fx.restore(call, state)
    assert torch.export.export(model, (x,), strict=strict).module()(x).isfinite().all()


@pytest.mark.usefixtures("uncompiled")
def test_a_released_weight_tells_what_it_was() -> None:
    model, x = Model(), torch.randn(4, 64)
    call, weight = compiled(model), model.q.weight
    call(x)
    fp8fx.release(call)
    assert (weight.shape, weight.size(0), weight.numel(), weight.dim(), len(weight)) == ((64, 64), 64, 4096, 2, 64)
    assert (weight.dtype, weight.device.type, weight.requires_grad) == (torch.float32, "cpu", False)
    assert weight.is_floating_point()
    assert isinstance(weight, nn.Parameter)
    assert weight in set(model.parameters())
    assert repr(weight) == "released float32(64, 64)"
    weight.requires_grad, weight.grad = False, None
    model.eval().requires_grad_(False)


@pytest.mark.slow
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("how", ["many shapes", "a function of the layer"])
def test_where_dynamo_gives_up_compiling_a_released_model_runs_on_no_nan(how: str) -> None:
    options = {"recipe": "global", "freeze": True}
    model = nn.ModuleList(Layer() for _ in range(6 if how == "a function of the layer" else 1)).requires_grad_(False)
    call = torch.compile(lambda layer, x: layer(x), backend="fp8", dynamic=False, options=options)
    inputs = [torch.randn(rows, 64) for rows in ((4,) if len(model) > 1 else range(2, 8))]
    calls = [(layer, x) for layer in model for x in inputs]
    expected = [call(layer, x) for layer, x in calls]
    assert fp8fx.release(model) > 0
    for (layer, x), out in zip(
        calls, expected, strict=True
    ):  # twice as many compilations, which is more than Dynamo's limit
        with contextlib.suppress(FreezeError):
            assert torch.equal(call(layer, x), out)
