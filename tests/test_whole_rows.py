"""whole_rows: which rows Inductor keeps in registers, and in which graphs; a user's choices stay."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch
from torch import nn
from torch._inductor.runtime.hints import ReductionHint

from fp8fx.torch_internals import InductorChoices, V, inductor_config
from fp8fx.whole_rows import whole_rows


class _Sizes:
    @staticmethod
    def statically_known_leq(size: Any, limit: int) -> bool:
        return bool(sympy.sympify(size <= limit) == sympy.true)

    @staticmethod
    def optimization_hint(size: Any) -> int:
        return int(size)


def keeps(size: Any, hint: ReductionHint = ReductionHint.INNER, cooperative: bool = False) -> bool:
    """Whether a program keeps a row of so many values, under the choices of now."""
    features = SimpleNamespace(
        reduction_numel=sympy.sympify(size),
        numel=sympy.Integer(4096),
        get_reduction_hint=lambda: hint,
        strict_reduction_rblock=lambda: None,
        has_strict_multirow_reduction=lambda: False,
    )
    with V.set_graph_handler(SimpleNamespace(sizevars=_Sizes())):
        return bool(V.choices.should_use_persistent_reduction(features, cooperative))


@pytest.mark.parametrize("size", [512, 1024, 1025, 4096, 12288, 16384])
def test_long_rows_are_kept_inside(size: int) -> None:
    assert keeps(size) == (size <= 1024)
    with whole_rows():
        assert keeps(size)
    assert keeps(size) == (size <= 1024)


@pytest.mark.parametrize("size", [16385, 151936, sympy.Symbol("s0", integer=True, positive=True)], ids=str)
def test_rows_that_are_too_long_or_of_an_unknown_length_are_not(size: Any) -> None:
    with whole_rows():
        assert not keeps(size)


@pytest.mark.parametrize("hint", [hint for hint in ReductionHint if hint.name not in ("INNER", "OUTER_TINY")])
def test_columns_are_not(hint: ReductionHint) -> None:
    with whole_rows():
        assert not keeps(4096, hint)


def test_a_row_that_several_programs_share_is_not() -> None:
    with whole_rows():
        assert not keeps(16384, cooperative=True)


def test_choices_of_the_users_own_stay() -> None:
    class Own(InductorChoices):
        pass

    with V.set_choices_handler(Own()), whole_rows():
        assert type(V.choices) is Own
    assert type(V.choices) is InductorChoices


def test_inductor_may_be_told_to_keep_none() -> None:
    with inductor_config.patch({"triton.persistent_reductions": False}), whole_rows():
        assert not keeps(4096)


@pytest.mark.skipif(not hasattr(inductor_config, "numerics"), reason="torch < 2.15 is told no order of sums")
def test_an_order_of_sums_stays() -> None:
    with inductor_config.patch({"numerics": "strict_reduction"}), whole_rows():
        assert type(V.choices) is InductorChoices


@pytest.mark.compiles
@pytest.mark.parametrize("trains", [False, True])
def test_a_compilation_has_them_in_inference_alone(trains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    entered = 0

    def spy() -> Any:
        nonlocal entered
        entered += 1
        return whole_rows()

    monkeypatch.setattr("fp8fx.lowering.whole_rows", spy)
    linear = nn.Linear(32, 32)
    compiled = torch.compile(linear, backend="fp8", options={"profit": "always", "fx_graph_cache": False})
    with torch.set_grad_enabled(trains):
        y = compiled(torch.randn(4, 32))
        if trains:
            y.sum().backward()
    assert entered == (0 if trains else 1)
    assert type(V.choices) is InductorChoices
