"""State dicts beside frozen weights: the model's own is complete, and one that does not fit is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fp8fx
from fp8fx.errors import FreezeError
from tests.support.freezing import Model, State, equal, frozen, state_of
from tests.support.frozen_models import COPIES, Tied


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("copied", COPIES)
def test_the_state_dict_of_the_model_before_is_refused_by_every_copy(copied: str, strict: bool) -> None:
    gm, x, new = COPIES[copied](frozen(Model())), torch.randn(4, 64), Model().state_dict()
    before, expected = state_of(gm), gm(x)
    for state in (new, new | before, {"k.weight": new["k.weight"]}):
        with pytest.raises(FreezeError, match=r"has k\.weight.*which this model holds frozen; fp8fx\.refresh"):
            gm.load_state_dict(state, strict=strict)
        assert equal(state_of(gm), before)
        assert torch.equal(gm(x), expected)
    other = frozen(Model())
    gm.load_state_dict(other.state_dict(), strict=strict)
    assert torch.equal(gm(x), other(x))


@pytest.mark.parametrize("strict", [True, False])
def test_a_weight_that_is_held_beside_what_was_frozen_of_it_is_not_loaded_alone(strict: bool) -> None:
    class Reused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(48, 64)), nn.Parameter(torch.randn(48))
            self.requires_grad_(False)

        def forward(self, tokens: Tensor) -> Tensor:
            return F.linear(F.embedding(tokens, self.weight), self.weight, self.bias)

    gm, other = frozen(Reused()), frozen(Reused())
    before, new = state_of(gm), other.state_dict()
    assert {"weight", "weight_fp8"} < new.keys()
    for state in (Reused().state_dict(), {"weight": new["weight"]}):
        with pytest.raises(FreezeError, match="has weight, which this model holds frozen"):
            gm.load_state_dict(state, strict=strict)
        assert equal(state_of(gm), before)
    gm.load_state_dict(new, strict=strict)
    assert equal(state_of(gm), new)


@pytest.mark.parametrize("strict", [True, False])
def test_a_tied_weight_is_refused_by_its_other_name(strict: bool) -> None:
    tokens, other = torch.randint(0, 48, (4, 8)), Tied().state_dict()
    gm = frozen(Tied())
    state, expected = state_of(gm), gm(tokens)
    with pytest.raises(FreezeError, match=r"embed\.weight, which this model holds frozen"):
        gm.load_state_dict({"embed.weight": other["embed.weight"]}, strict=strict)
    assert equal(state_of(gm), state)
    gm.load_state_dict(state)  # its own has what was frozen, too
    assert torch.equal(gm(tokens), expected)


class Extra(nn.Sequential):
    """A model whose state dict holds more than tensors."""

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 3}

    def set_extra_state(self, state: Any) -> None:
        assert state == {"version": 3}


def test_the_models_own_state_dict_is_always_complete() -> None:
    model = Extra(nn.Linear(64, 48), nn.BatchNorm1d(48), nn.Linear(48, 64)).requires_grad_(False).eval()
    new, x = fp8fx.convert(model, freeze=True), torch.randn(4, 64)
    expected = new(x)
    fp8fx.refresh(new, model.state_dict())
    assert torch.equal(new(x), expected)


WRONG: dict[str, Callable[[State], State]] = {
    "a shape that broadcasts": lambda s: {**s, "norm.weight": torch.ones(1)},
    "a transposed weight": lambda s: {**s, "k.weight": s["k.weight"].t()},
    "infinity in the last of two merged weights": lambda s: {**s, "k.weight": s["k.weight"] / 0},
    "NaN in the last weight": lambda s: {**s, "out.weight": s["out.weight"] * torch.nan},
    "float64": lambda s: {**s, "out.weight": s["out.weight"].double()},
    "no tensor": lambda s: {**s, "q.weight": s["q.weight"].tolist()},  # type: ignore[dict-item]
    "nothing": lambda s: {},
    "all names prefixed": lambda s: {f"model.{name}": x for name, x in s.items()},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_state_dict_changes_nothing(wrong: str) -> None:
    gm = frozen(Model())
    before = state_of(gm)
    with pytest.raises(FreezeError):
        fp8fx.refresh(gm, WRONG[wrong]({name: 2 * y for name, y in Model().state_dict().items()}))
    assert equal(state_of(gm), before)
