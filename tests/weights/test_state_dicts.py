"""State dicts of converted models: that of the model as it was is quantized, and one that does not fit changes
nothing."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fp8fx
from fp8fx.errors import FreezeError
from fp8fx.recipes.recipe import RECIPES
from tests.support.freezing import Model, State, equal, error, frozen, saved, state_of
from tests.support.frozen_models import COPIES, Tied

recipes = pytest.mark.parametrize("recipe", RECIPES)


@pytest.mark.parametrize("how", [{}, {"strict": False}, {"assign": True}], ids=["", "not strict", "assign"])
@pytest.mark.parametrize("copied", COPIES)
def test_every_copy_takes_the_state_dict_of_the_model_before_and_its_own(copied: str, how: dict[str, bool]) -> None:
    gm, x, model = COPIES[copied](frozen(Model())), torch.randn(4, 64), Model()
    expected = frozen(model)
    assert not list(gm.load_state_dict(state_of(model), **how).missing_keys)
    assert equal(state_of(gm), state_of(expected))
    assert torch.equal(gm(x), expected(x))
    other = frozen(Model())
    gm.load_state_dict(state_of(other), **how)
    assert equal(state_of(gm), state_of(other))
    assert torch.equal(gm(x), other(x))


@recipes
def test_a_state_dict_of_the_frozen_model_loads(recipe: str) -> None:
    model, gm, x = Model(), frozen(Model(), recipe), torch.randn(4, 64)
    expected = frozen(model, recipe)(x)
    model.weight = nn.Parameter(model.weight.t().contiguous().t(), requires_grad=False)
    fp8fx.freeze(model, recipe)
    gm.load_state_dict(model.state_dict())
    assert error(gm(x), expected) < 1e-2


class Reused(nn.Module):
    """One parameter as an embedding and as the weight of a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(48, 64)), nn.Parameter(torch.randn(48))
        self.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(F.embedding(tokens, self.weight), self.weight, self.bias)


@pytest.mark.parametrize("strict", [True, False])
def test_a_weight_that_is_held_beside_what_was_frozen_of_it_is_loaded_with_it(strict: bool) -> None:
    gm, model, tokens = frozen(Reused()), Reused(), torch.randint(48, (3, 5))
    expected = frozen(model)
    assert {"weight", "weight_frozen", "weight_frozen_scale"} < gm.state_dict().keys()
    gm.load_state_dict(model.state_dict(), strict=strict)
    assert equal(state_of(gm), state_of(expected))
    assert torch.equal(gm(tokens), expected(tokens))
    other = state_of(frozen(Reused()))
    gm.load_state_dict(other, strict=strict)
    assert equal(state_of(gm), other)
    gm.load_state_dict({"weight": model.weight}, strict=False)
    assert equal(state_of(gm), {**state_of(expected), "bias": other["bias"]})


@pytest.mark.parametrize("strict", [True, False])
def test_a_tied_weight_is_loaded_by_its_other_name(strict: bool) -> None:
    tokens, model = torch.randint(0, 48, (4, 8)), Tied()
    gm, expected = frozen(Tied()), frozen(model)
    state = {name: x for name, x in model.state_dict().items() if name != "head.weight"}  # as files of tied models are
    gm.load_state_dict(state, strict=strict)
    assert equal(state_of(gm), state_of(expected))
    assert torch.equal(gm(tokens), expected(tokens))
    own = state_of(gm)
    gm.load_state_dict(own)
    assert equal(state_of(gm), own)


class Extra(nn.Sequential):
    """A model whose state dict holds more than tensors."""

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 3}

    def set_extra_state(self, state: Any) -> None:
        assert state == {"version": 3}


def test_the_models_own_state_dict_is_always_complete() -> None:
    model = Extra(nn.Linear(64, 48), nn.BatchNorm1d(48), nn.Linear(48, 64)).requires_grad_(False).eval()
    new, x = fp8fx.convert(model, freeze=True), torch.randn(4, 64)
    expected, state = new(x), {name: y for name, y in model.state_dict().items() if name != "_extra_state"}
    assert new.state_dict().keys() - {"0.weight_scale", "2.weight_scale"} == state.keys()
    new.load_state_dict(state)
    assert torch.equal(new(x), expected)


def test_a_converted_model_is_a_part_of_another() -> None:
    outer = nn.Sequential(nn.Linear(64, 64), saved(frozen(Model()))).requires_grad_(False)
    model, x = Model(), torch.randn(4, 64)
    state = nn.Sequential(nn.Linear(64, 64), model).state_dict()
    outer.load_state_dict(state)
    assert torch.equal(outer[1](x), frozen(model)(x))
    again = copy.deepcopy(outer)
    again.load_state_dict(outer.state_dict())
    assert torch.equal(again(x), outer(x))


class Constants(nn.Module):
    """Weights of a tensor that no state dict has, and gathered by one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.constant = nn.Parameter(torch.randn(48, 64)), torch.randn(64, 32)
        self.fc = nn.Linear(16, 8)
        self.register_buffer("buffer", torch.randn(16, 64), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        gathered = F.linear(x, self.weight[torch.arange(0, 48, 2)])
        return gathered, x.relu() @ self.constant, self.fc(F.linear(x.tanh(), self.buffer))


@pytest.mark.parametrize("copied", [lambda gm: gm, copy.deepcopy, saved], ids=["", "copy", "file"])
def test_what_no_state_dict_has_stays_when_a_converted_model_takes_new_weights(copied: Callable[..., Any]) -> None:
    model, x = Constants().requires_grad_(False), torch.randn(4, 64)
    gm = copied(fp8fx.convert(model, freeze=True))
    model.weight.mul_(3)
    model.fc.weight.mul_(2)
    gm.load_state_dict(model.state_dict())
    for found, expected in zip(gm(x), fp8fx.convert(model)(x), strict=True):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)  # the weight lies otherwise in memory


def test_values_of_another_dtype_are_quantized() -> None:
    model, x = Model(), torch.randn(4, 64)
    gm, expected = frozen(Model()), frozen(model)
    gm.load_state_dict({name: y.double() for name, y in model.state_dict().items()})
    assert equal(state_of(gm), state_of(expected))
    assert torch.equal(gm(x), expected(x))


@recipes
@pytest.mark.parametrize(("k", "n"), [(1, 2), (3, 1), (1, 1), (2, 2)])
def test_weights_of_any_size_load(k: int, n: int, recipe: str) -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.kn = nn.Parameter(torch.randn(2, n, k)), nn.Parameter(torch.randn(k, n))
            self.requires_grad_(False)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return F.linear(x, self.w[0]), x.relu() @ self.kn, self.kn

    model, gm, x = Parts(), frozen(Parts(), recipe), torch.randn(3, k)
    gm.load_state_dict(model.state_dict())
    assert equal(state_of(gm), state_of(frozen(model, recipe)))
    assert torch.equal(gm(x)[1], frozen(model, recipe)(x)[1])


def _lacks(state: State, *names: str) -> State:
    return {name: x for name, x in state.items() if name not in names}


WRONG: dict[str, tuple[Callable[[State], Any], str]] = {
    "a transposed weight": (
        lambda s: {**s, "k.weight": s["k.weight"].t()},
        r"k\.weight: \(64, 32\) in the state dict; expected \(32, 64\); nothing was changed",
    ),
    "another shape": (
        lambda s: {**s, "out.weight": torch.zeros(3, 3)},
        r"out\.weight: \(3, 3\) in the state dict; expected \(64, 64\); nothing was loaded",
    ),
    "infinity in the last of two merged weights": (
        lambda s: {**s, "k.weight": s["k.weight"] / 0},
        r"q\.weight, k\.weight: inf or NaN .*; nothing was changed",
    ),
    "NaN in the last weight": (
        lambda s: {**s, "out.weight": s["out.weight"] * torch.nan},
        r"out\.weight: inf or NaN in the state dict; nothing was loaded",
    ),
    "no tensor": (
        lambda s: {**s, "out.weight": s["out.weight"].tolist()},
        r"out\.weight: a list in the state dict; expected a tensor; nothing was loaded",
    ),
    "no tensor for one of two merged weights": (
        lambda s: {**s, "q.weight": s["q.weight"].tolist()},
        r"q\.weight: a list in the state dict; expected \(64, 64\); nothing was changed",
    ),
    "one of two merged weights": (
        lambda s: _lacks(s, "k.weight"),
        r"the state dict lacks k\.weight, which this model holds in one FP8 weight with others.*; nothing was changed",
    ),
    "FP8 data without a scale": (
        lambda s: {**s, "q.weight": s["q.weight"].to(torch.float8_e4m3fn)},
        r"q\.weight: FP8 data without a scale; nothing was changed",
    ),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_state_dict_changes_nothing(wrong: str, strict: bool) -> None:
    gm, (change, message) = frozen(Model()), WRONG[wrong]
    before = state_of(gm)
    with pytest.raises(FreezeError, match=message):
        gm.load_state_dict(change({name: 2 * y for name, y in Model().state_dict().items()}), strict=strict)
    assert equal(state_of(gm), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {}, r"Missing key\(s\) in state_dict: .*q_weight_frozen"),
        (lambda s: {f"model.{name}": x for name, x in s.items()}, r"Unexpected key\(s\) in state_dict: .*model"),
        (lambda s: {**s, "extra": torch.zeros(1)}, r'Unexpected key\(s\) in state_dict: "extra"'),
        (lambda s: _lacks(s, "out.weight"), r'Missing key\(s\) in state_dict: "out\.weight"'),
        (lambda s: _lacks(s, "q.weight", "k.weight"), r'Missing key\(s\) in state_dict: "q_weight_frozen"'),
        (lambda s: {**s, "norm.weight": torch.ones(3)}, r"size mismatch for norm\.weight"),
    ],
    ids=["nothing", "prefixed", "more", "a weight", "siblings", "a norm's shape"],
)
def test_what_torch_tells_of_a_state_dict(change: Callable[[State], State], message: str) -> None:
    gm = frozen(Model())
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        gm.load_state_dict(change(Model().state_dict()))


class Siblings(nn.Module):
    """Two linears that become one GEMM, and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 48)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.q(x) + self.k(x).abs())


def converted_twice(model: nn.Module) -> Any:
    return fp8fx.convert(fp8fx.convert(model, freeze=True, include="o"), freeze=True)


def frozen_then_converted(model: nn.Module) -> Any:
    fp8fx.freeze(model, "mixed", include="o")
    return fp8fx.convert(model, freeze=True)


@pytest.mark.parametrize("made", [converted_twice, frozen_then_converted])
@pytest.mark.parametrize("copied", [lambda gm: gm, copy.deepcopy, lambda gm: pickle.loads(pickle.dumps(gm))])
def test_what_was_made_of_a_model_that_is_gone_takes_state_dicts(made: Any, copied: Any) -> None:
    gm, x, model = copied(made(Siblings())), torch.randn(4, 64), Siblings()
    gc.collect()
    state, y = state_of(model), model(x)
    assert error(gm(x), y) > 0.5
    gm.load_state_dict(state)
    assert error(gm(x), y) < 0.1
    other = made(Siblings())
    gm.load_state_dict(other.state_dict())
    assert torch.equal(gm(x), other(x))


def test_a_pickle_holds_no_weight_of_the_model_before() -> None:
    once, twice = fp8fx.convert(Siblings(), freeze=True), converted_twice(Siblings())
    assert len(pickle.dumps(twice)) < 1.2 * len(pickle.dumps(once))


@recipes
def test_a_weight_of_one_output_channel_loads(recipe: str) -> None:
    class Column(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 1), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    gm, x, model = fp8fx.convert(Column(), freeze=True, recipe=recipe, min_features=1), torch.randn(4, 64), Column()
    assert isinstance(gm.weight, fp8fx.FP8Weight)
    gm.load_state_dict(model.state_dict())
    assert error(gm(x), model(x)) < 0.1
    gm.load_state_dict(fp8fx.convert(model, freeze=True, recipe=recipe, min_features=1).state_dict())
    assert error(gm(x), model(x)) < 0.1


SCALES: dict[str, Callable[[Tensor], Any]] = {
    "flat": lambda scale: scale.flatten(),
    "another dtype": lambda scale: scale.to(torch.int32),
    "no tensor": lambda scale: "1.0",
    "of another size": lambda scale: scale[:3],
}


@pytest.mark.parametrize("change", SCALES)
def test_the_scale_of_a_sibling_that_is_wrong_changes_nothing(change: str) -> None:
    gm, model, x = fp8fx.convert(Siblings(), freeze=True), Siblings(), torch.randn(4, 64)
    fp8fx.freeze(model, "mixed")
    state, before = model.state_dict(), gm(x)
    state["q.weight_scale"] = SCALES[change](state["q.weight_scale"])
    with pytest.raises(FreezeError, match=r"q\.weight_scale: expected float32"):
        gm.load_state_dict(state)
    assert torch.equal(gm(x), before)


@pytest.mark.parametrize("strict", [True, False])
def test_fp8_data_is_not_loaded_into_a_weight_in_high_precision(strict: bool) -> None:
    model, other = Siblings(), Siblings()
    gm = fp8fx.convert(model, freeze=True, exclude="q")
    fp8fx.freeze(other)
    before = model.q.weight.clone()
    with pytest.raises(FreezeError, match=r"q\.weight: FP8 data for a tensor that is torch\.float32 here"):
        gm.load_state_dict(other.state_dict(), strict=strict)
    assert torch.equal(model.q.weight, before)


def test_a_tensor_of_the_users_where_a_scale_would_be_saved_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(64, 48)).requires_grad_(False)
    model[0].register_parameter("weight_scale", nn.Parameter(torch.rand(48), requires_grad=False))
    for make in (fp8fx.freeze, lambda model: fp8fx.convert(model, freeze=True)):
        with pytest.raises(FreezeError, match=r"the model has .*weight_scale"):
            make(model)
    assert not isinstance(model[0].weight, fp8fx.FP8Weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_assigned_values_of_another_dtype_are_quantized(dtype: torch.dtype) -> None:
    model, value = nn.Sequential(nn.Linear(64, 48)).requires_grad_(False), (torch.randn(48, 64) * 4).to(dtype)
    fp8fx.freeze(model)
    model.load_state_dict({"0.weight": value, "0.bias": torch.zeros(48)}, assign=True)
    assert isinstance(model[0].weight, fp8fx.FP8Weight)
    assert error(model[0].weight.dequantize(), value) < 0.05
