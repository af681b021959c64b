"""refresh: what is frozen beside a model. tests/weights/test_lookup.py calls it after writes that leave no trace."""

from __future__ import annotations

import pytest

import fp8fx
from fp8fx.errors import FreezeError, GraphError
from tests.support.freezing import Model, frozen


def test_a_model_of_which_nothing_is_frozen() -> None:
    with pytest.raises(FreezeError, match="nothing is frozen beside this model"):
        fp8fx.refresh(Model())
    with pytest.raises(GraphError, match="got a int; expected the model"):
        fp8fx.refresh(3)  # type: ignore[arg-type]


def test_a_converted_model_has_nothing_to_refresh() -> None:
    with pytest.raises(FreezeError, match=r"nothing is frozen beside .* take new values by model\.load_state_dict"):
        fp8fx.refresh(frozen(Model()))
