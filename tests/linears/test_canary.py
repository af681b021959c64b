"""Every way to write a linear, and every view of a weight, as the running torch's Dynamo writes it: all of them are
rewritten.

A new torch may write the same program with other functions. This test then names the node that was not recognised:
give its operator a place in `fp8fx/graph/operators.py` or `fp8fx/linears/forms.py`. The examples of the forms there are
tested here as well, so that a new form needs no line in this file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import fx

from fp8fx.graph import operators
from fp8fx.graph.constants import constants
from fp8fx.linears import forms, weight_operand
from fp8fx.linears.form import Form
from fp8fx.passes.rewrite import match
from tests.support.capture import after
from tests.support.one_linear import of_form, program
from tests.support.programs import Program
from tests.support.written import EXPERT_PLACES, EXPERTS, PLACES, WAYS, Place, Way

_KEYWORDS = ("torch.transpose(input={p}, dim0=0, dim1=1)", "torch.permute(input={p}, dims=(1, 0))")
_TURNS = (".t()", ".T", ".mT", ".transpose(0, 1)", ".swapaxes(-1, -2)", ".permute(1, 0)", ".data.T", ".H", ".adjoint()")
_CASTS = (".half()", ".type(torch.float16)", ".to(torch.bfloat16)", ".bfloat16()")


def first_unrecognised(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Iterator[fx.Node]:
    """The nodes that read a weight and are neither a view or cast of it nor a linear."""
    rewrite = after([match], gm, example_inputs, routers=True, convolutions=True)
    roots = constants(rewrite.gm, example_inputs)
    linears = {found.node for found in rewrite.matches}
    pending = list(roots)
    while pending:
        for user in pending.pop().users:
            if weight_operand.is_called_view(user) or weight_operand.is_cast(user) or weight_operand.is_gather(user):
                pending.append(user)
            elif user.op.startswith("call_") and user not in linears:
                yield user


def demand_rewritten(written: Program) -> None:
    captured: list[tuple[fx.GraphModule, list[Any]]] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        captured.append((gm, example_inputs))
        return gm.forward

    torch.compile(written.model(), backend=backend)(*written.arguments(False))
    assert len(captured) == 1, written.source
    gm, example_inputs = captured[0]
    rewrite = after([match], gm, example_inputs, convolutions=True)
    if len(rewrite.matches) == written.lines[0].rewritten and not rewrite.refusals:
        return
    unknown = ", ".join(
        f"{node.format_node()} which calls {node.target!r}" for node in first_unrecognised(gm, example_inputs)
    )
    pytest.fail(
        f"torch {torch.__version__} writes\n{written.source}with a node that was not recognised: "
        f"{unknown or 'none reads a weight'}"
    )


_FIRST, _EXPERT = PLACES[0], EXPERT_PLACES[0]
_LINEAR, _AT, _BATCHED = WAYS[0], *(next(way for way in ways if way.written == "{x} @ {v}") for ways in (WAYS, EXPERTS))


@pytest.mark.parametrize("way", [way for way in WAYS if way.rewritten], ids=lambda way: way.written)
def test_every_way_to_write_a_linear(way: Way) -> None:
    demand_rewritten(program(way, _FIRST, way.dims[-1], ".t()"))


_WRITTEN = {way.written for way in (*WAYS, *EXPERTS)}
_OTHER_EXAMPLES = [form for form in forms.FORMS.values() if form.is_rewritten and form.example not in _WRITTEN]


@pytest.mark.parametrize("form", _OTHER_EXAMPLES, ids=lambda form: form.operator)
def test_every_form(form: Form) -> None:
    demand_rewritten(of_form(form))


@pytest.mark.parametrize("way", [_LINEAR, _AT], ids=lambda way: way.written)
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.view)
def test_every_view_of_a_weight(place: Place, way: Way) -> None:
    demand_rewritten(program(way, place, 3, ".T"))


@pytest.mark.parametrize("turn", _TURNS)
def test_every_transposition(turn: str) -> None:
    demand_rewritten(program(_AT, _FIRST, 3, turn))


@pytest.mark.parametrize("view", _KEYWORDS)
def test_every_argument_by_keyword(view: str) -> None:
    demand_rewritten(program(_LINEAR, Place("{k}, {n}", view), 3, ".T"))


@pytest.mark.parametrize("cast", _CASTS)
def test_every_cast(cast: str) -> None:
    demand_rewritten(program(_LINEAR, _FIRST, 3, ".T", cast))


@pytest.mark.parametrize("way", [way for way in EXPERTS if way.rewritten], ids=lambda way: way.written)
def test_every_way_to_write_experts(way: Way) -> None:
    demand_rewritten(program(way, _EXPERT, way.dims[-1], ".mT", experts=True))


@pytest.mark.parametrize("place", EXPERT_PLACES, ids=lambda place: place.view)
def test_every_view_of_experts_weights(place: Place) -> None:
    demand_rewritten(program(_BATCHED, place, 3, ".mT", experts=True))


def test_the_canary_names_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_operand, "views_first", lambda node: "permute" not in operators.called(node))
    with pytest.raises(pytest.fail.Exception, match=r"not recognised: .* which calls 'permute'"):
        demand_rewritten(program(_AT, _FIRST, 2, ".permute(1, 0)"))
    monkeypatch.undo()
    monkeypatch.delitem(forms.FORMS, "mm")
    with pytest.raises(pytest.fail.Exception, match=r"not recognised: .* which calls 'mm'"):
        demand_rewritten(program(next(way for way in WAYS if way.written == "{x}.mm({v})"), _FIRST, 2, ".t()"))
