"""refresh: frozen weights take new values, all of them or none."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import fp8fx
from fp8fx.errors import FreezeError
from tests.support.freezing import Model, State, equal, error, frozen, state_of
from tests.support.frozen_models import compiled, is_released


def broken(state: State, how: str) -> State:
    changed = dict(state)
    if how == "lacks":
        del changed["k.weight"]
    elif how == "has besides":
        changed["extra"] = torch.zeros(1)
    elif how == "shape":
        changed["q.weight"] = torch.zeros(3, 3)
    elif how == "dtype":
        changed["norm.weight"] = changed["norm.weight"].half()
    else:
        changed["out.weight"] = torch.full_like(changed["out.weight"], torch.nan)
    return changed


MESSAGES = {
    "lacks": r"lacks k\.weight; .*nothing was changed",
    "has besides": r"has besides extra; .*nothing was changed",
    "shape": r"q\.weight is float32\(3, 3\) in the state dict; expected float32\(64, 64\), nothing was changed",
    "dtype": r"norm\.weight is float16\(64,\) in the state dict; expected float32\(64,\)",
    "NaN": r"out\.weight: inf or NaN",
}
every_way = pytest.mark.parametrize("how", MESSAGES)


@every_way
def test_a_bad_refresh_of_a_converted_model_changes_nothing(how: str) -> None:
    gm = frozen(Model())
    before = state_of(gm)
    with pytest.raises(FreezeError, match=MESSAGES[how]):
        fp8fx.refresh(gm, broken(state_of(Model()), how))
    assert equal(state_of(gm), before)


class Constants(nn.Module):
    """Weights of a tensor that no state dict has, and gathered by one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.constant = nn.Parameter(torch.randn(48, 64)), torch.randn(64, 32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x, self.weight[torch.arange(0, 48, 2)]), x.relu() @ self.constant


@pytest.mark.parametrize(
    "copied", [lambda gm: gm, copy.deepcopy, lambda gm: copy.deepcopy(copy.deepcopy(gm))], ids=["", "copy", "copies"]
)
def test_constants_stay_when_a_converted_model_takes_new_weights(copied: Callable[..., Any]) -> None:
    model, x = Constants().requires_grad_(False), torch.randn(4, 64)
    gm = copied(fp8fx.convert(model, freeze=True))
    model.weight.mul_(3)
    fp8fx.refresh(gm, model.state_dict())
    for found, expected in zip(gm(x), fp8fx.convert(model)(x), strict=True):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)  # the weight lies otherwise in memory


def test_a_converted_model_has_nothing_to_refresh_from_itself() -> None:
    with pytest.raises(FreezeError, match="holds no original weights; pass the state dict"):
        fp8fx.refresh(frozen(Model()))


@pytest.mark.parametrize("call", [fp8fx.refresh, fp8fx.release], ids=["refresh", "release"])
def test_a_model_of_which_nothing_is_frozen(call: Callable[[Any], Any]) -> None:
    with pytest.raises(FreezeError, match="nothing of this model is frozen"):
        call(Model())
    with pytest.raises(fp8fx.errors.GraphError, match="got a int; expected the model"):
        call(3)


@pytest.mark.compiles
def test_a_compiled_model_is_frozen_until_it_is_refreshed() -> None:
    model, x = Model(), torch.randn(4, 64)
    counter = CompileCounterWithBackend("fp8")
    call, counted = compiled(model), torch.compile(model, backend=counter)
    first = call(x)
    counted(x)
    assert error(first, frozen(model)(x)) < 1e-5
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    stale, fresh = call(x), counted(x)
    assert error(stale, fresh) > 0.05  # the norm and the biases are seen, the frozen weights are not
    fp8fx.refresh(call)
    assert error(call(x), frozen(model)(x)) < 1e-5
    other = Model()
    fp8fx.refresh(model, other.state_dict())
    assert error(call(x), frozen(other)(x)) < 1e-5
    assert equal(state_of(model), state_of(other))


@pytest.mark.compiles
@every_way
def test_a_bad_refresh_of_a_compiled_model_changes_nothing(how: str) -> None:
    model, x = Model(), torch.randn(4, 64)
    call = compiled(model)
    expected, before = call(x), state_of(model)
    with pytest.raises(FreezeError, match=MESSAGES[how]):
        fp8fx.refresh(call, broken(state_of(Model()), how))
    assert equal(state_of(model), before)
    assert torch.equal(call(x), expected)


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
    expected = fp8fx.convert(fx.symbolic_trace(copy.deepcopy(model)))
    compiled = torch.compile(model, backend="fp8", options={"freeze": True})
    for _ in range(3):
        torch.testing.assert_close(compiled(x), expected(x), rtol=1e-4, atol=1e-5)
    fp8fx.release(compiled)
    torch.testing.assert_close(compiled(x), expected(x), rtol=1e-4, atol=1e-5)
    assert is_released(model.fc.weight) and not is_released(model.state.weight)


class Pair(nn.Module):
    """Two siblings, of which one's weight may be a tensor that no state dict has."""

    def __init__(self, first: str) -> None:
        super().__init__()
        self.first = first
        self.weight, self.constant = nn.Parameter(torch.randn(64, 64), requires_grad=False), torch.randn(64, 64)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x @ getattr(self, name) for name in sorted(("weight", "constant"), key=lambda name: name != self.first)]


@pytest.mark.compiles
@pytest.mark.parametrize("first", ["weight", "constant"])
def test_a_constant_that_is_frozen_with_a_weight_stays_when_that_is_refreshed(first: str) -> None:
    model, x = Pair(first), torch.randn(4, 64)
    backend = fp8fx.Backend(fp8fx.Config(freeze=True, recipe="rowwise"))
    call = torch.compile(model, backend=backend)
    call(x)
    assert [row.remark[:8] for row in backend.reports[0].rewritten] == ["one GEMM", "one GEMM"]
    model.weight.mul_(-3)
    fp8fx.refresh(model)
    for found, expected in zip(call(x), fp8fx.convert(model, recipe="rowwise")(x), strict=True):
        assert error(found, expected) < 1e-5


@pytest.mark.compiles
@pytest.mark.parametrize("gone", ["q", "k"])
def test_a_sibling_that_was_replaced(gone: str) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = (nn.Linear(64, 64).requires_grad_(False) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.q(x), self.k(x)])

    model, x = Two(), torch.randn(4, 64)
    call = compiled(model)
    call(x)
    getattr(model, gone).weight = nn.Parameter(torch.randn(64, 64), requires_grad=False)
    gc.collect()
    call(x)
    for parameter in model.parameters():
        parameter.mul_(1.5)
    fp8fx.refresh(model)
    assert error(call(x), compiled(copy.deepcopy(model))(x)) < 1e-5


@pytest.mark.compiles
def test_refreshing_compiles_nothing() -> None:
    model, x = Model(), torch.randn(4, 64)
    backend = fp8fx.Backend(fp8fx.Config(freeze=True))
    call = torch.compile(model, backend=backend)
    for _ in range(3):
        call(x)
        fp8fx.refresh(call, Model().state_dict())
    assert len(backend.reports) == 1


@pytest.mark.usefixtures("uncompiled")
def test_a_graph_compiled_after_a_change_has_the_new_weights_and_then_so_have_all() -> None:
    model, x = Model(), torch.randn(4, 64)
    first = copy.deepcopy(model)
    call = torch.compile(model, backend="fp8", dynamic=False, options={"recipe": "global", "freeze": True})
    call(x)
    for weight in (model.q.weight, model.k.weight, model.weight, model.out.weight):
        weight.mul_(3)
    assert torch.equal(call(x), frozen(first)(x))  # a promise was broken
    assert torch.equal(call(x[:3]), frozen(model)(x[:3]))
    assert torch.equal(call(x), frozen(model)(x))
    for weight in (model.q.weight, model.k.weight, model.weight, model.out.weight):
        weight.mul_(3)
    fp8fx.refresh(call)
    for rows in (4, 3, 2):
        assert torch.equal(call(x[:rows]), frozen(model)(x[:rows]))


@pytest.mark.usefixtures("uncompiled")
def test_a_model_compiled_anew_has_the_weights_that_it_has_now_under_every_recipe() -> None:
    model, x = Model(), torch.randn(4, 64)
    compiled(model)(x)
    model.load_state_dict(Model().state_dict())
    torch._dynamo.reset()
    for recipe in ("global", "rowwise"):
        assert torch.equal(compiled(model, recipe)(x), frozen(model, recipe)(x))


def _scale_data(model: nn.Module) -> None:
    for p in model.parameters():
        p.data.mul_(-2)


def _set_data(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = -2 * p.data


def _from_a_vector(model: nn.Module) -> None:
    vector_to_parameters(-2 * parameters_to_vector(model.parameters()), model.parameters())


def _in_inference_mode(model: nn.Module) -> None:
    with torch.inference_mode():
        for p in model.parameters():
            p.mul_(-2)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("write", [_scale_data, _set_data, _from_a_vector, _in_inference_mode])
def test_a_graph_compiled_after_a_write_that_no_version_counts_has_the_new_weights(
    write: Callable[[nn.Module], None],
) -> None:
    with torch.inference_mode(write is _in_inference_mode):
        model, x = Model(), torch.randn(4, 64)
        compiled(model)(x)
        versions = None if write is _in_inference_mode else [p._version for p in model.parameters()]
        write(model)
        assert versions is None or versions == [p._version for p in model.parameters()]
        torch._dynamo.reset()
        assert torch.equal(compiled(model)(x), frozen(model)(x))


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("how", ["converted", "compiled"])
@pytest.mark.parametrize("what", ["on the meta device", "sparse_coo"])
def test_a_refresh_with_values_that_cannot_be_copied_changes_nothing(what: str, how: str) -> None:
    model, x = Model(), torch.randn(4, 64)
    call = compiled(model) if how == "compiled" else frozen(model)
    expected, state = call(x), Model().state_dict()
    state["norm.weight"] = (
        state["norm.weight"].to("meta") if what == "on the meta device" else state["norm.weight"].to_sparse()
    )
    with pytest.raises(FreezeError, match=rf"norm\.weight is {what}.*; expected a dense tensor, nothing was changed"):
        fp8fx.refresh(call, state)
    assert torch.equal(call(x), expected)


@pytest.mark.usefixtures("uncompiled")
def test_two_layers_are_exchanged_by_a_refresh() -> None:
    model, x = (
        nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)).requires_grad_(False),
        torch.randn(4, 64),
    )
    exchanged = nn.Sequential(model[1], model[0])
    expected, call = frozen(copy.deepcopy(exchanged))(x), compiled(model)
    call(x)
    fp8fx.refresh(call, {"0.weight": model[1].weight, "1.weight": model[0].weight})
    assert torch.equal(call(x), expected)
    assert torch.equal(frozen(model)(x), expected)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("given", ["model.pt", Model(), Model().named_parameters()], ids=lambda x: type(x).__name__)
def test_what_is_no_state_dict_is_said_to_be_none(given: Any) -> None:
    model = Model()
    call = compiled(model)
    call(torch.randn(4, 64))
    for function in (fp8fx.refresh, fp8fx.restore):
        with pytest.raises(
            FreezeError, match=f"the state dict is a {type(given).__name__}; expected a mapping of names to tensors"
        ):
            function(call, given)


@pytest.mark.usefixtures("uncompiled")
def test_trained_weights_are_refused_when_a_frozen_model_is_called_in_grad_mode() -> None:
    model, x = Model().requires_grad_(), torch.randn(4, 64)
    call = compiled(model)
    with torch.no_grad():
        call(x)
    with pytest.raises(BackendCompilerFailed, match="requires grad in grad mode") as caught:
        call(x)
    assert isinstance(caught.value.inner_exception, FreezeError)


@pytest.mark.slow
@pytest.mark.usefixtures("uncompiled")
def test_a_compiled_function_or_submodule_is_refreshed_and_released_through_the_model() -> None:
    model, other, x = Model(), Model(), torch.randn(4, 64)
    call = torch.compile(lambda x: model(x), backend="fp8", options={"recipe": "global", "freeze": True})
    call(x)
    fp8fx.refresh(model, other.state_dict())
    assert torch.equal(call(x), frozen(other)(x))
    assert fp8fx.release(model) > 0
    assert torch.equal(call(x), frozen(other)(x))
    outer = nn.Sequential(nn.LayerNorm(64), other)
    outer[1] = compiled(other)  # type: ignore[assignment]
    expected = outer(x)
    fp8fx.refresh(outer, outer.state_dict())
    assert torch.equal(outer(x), expected)
    assert fp8fx.release(outer) > 0
    assert torch.equal(outer(x), expected)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", ["q", "k", "out"])  # q and k are one weight
def test_a_part_of_a_model_is_refreshed_by_itself_or_refused(name: str) -> None:
    model, x = Model(), torch.randn(4, 64)
    call = compiled(model)
    expected, before, part = call(x), state_of(model), model.get_submodule(name)
    new = {key: 2 * y for key, y in part.state_dict().items()}
    try:
        fp8fx.refresh(part, new)
    except FreezeError:
        assert equal(state_of(model), before)
        assert torch.equal(call(x), expected)
    else:
        assert equal(state_of(part), new)
        assert torch.equal(call(x), frozen(model)(x))


class Plain(nn.Module):
    """A weight that is an attribute, no parameter and no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.randn(48, 64)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w)


@pytest.mark.usefixtures("uncompiled")
def test_a_model_whose_frozen_weights_are_all_attributes() -> None:
    model, x = Plain(), torch.randn(4, 64)
    call = compiled(model)
    call(x)
    model.w.mul_(-2)
    fp8fx.refresh(model)
    assert torch.equal(call(x), frozen(model)(x))
    fp8fx.refresh(call, {})
    assert torch.equal(call(x), frozen(model)(x))
    assert fp8fx.release(model) == 0


def test_a_frozen_buffer_that_no_state_dict_has_stays_as_it_is() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 8)
            self.register_buffer("w", torch.randn(16, 32), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(F.linear(x, self.w))
            return out

    model, other, x = Model().requires_grad_(False), Model().requires_grad_(False), torch.randn(4, 32)
    gm = fp8fx.convert(model, freeze=True)
    fp8fx.refresh(gm, other.state_dict())
    other.w = model.w
    assert torch.equal(gm(x), fp8fx.convert(other, freeze=True)(x))
