"""refresh: the frozen weights of a converted model take new values, all of them or none."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fp8fx
from fp8fx.errors import FreezeError
from tests.support.freezing import Model, State, equal, frozen, state_of


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


def test_a_model_of_which_nothing_is_frozen() -> None:
    with pytest.raises(FreezeError, match="nothing of this model is frozen"):
        fp8fx.refresh(Model())
    with pytest.raises(fp8fx.errors.GraphError, match="got a int; expected the model"):
        fp8fx.refresh(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("what", ["on the meta device", "sparse_coo"])
def test_values_that_cannot_be_copied_change_nothing(what: str) -> None:
    gm, x = frozen(Model()), torch.randn(4, 64)
    expected, state = gm(x), Model().state_dict()
    norm = state["norm.weight"]
    state["norm.weight"] = norm.to("meta") if what == "on the meta device" else norm.to_sparse()
    with pytest.raises(FreezeError, match=rf"norm\.weight is {what}.*; expected a dense tensor, nothing was changed"):
        fp8fx.refresh(gm, state)
    assert torch.equal(gm(x), expected)


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
