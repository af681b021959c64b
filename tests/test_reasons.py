"""The table of reasons, each member of it."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from fp8fx.reasons import GROUPS, Because, OptionReason, Reason, WeightReason

ROOT = Path(__file__).parent.parent
SOURCES = sorted({*(ROOT / "fp8fx").rglob("*.py"), *(ROOT / "passes").rglob("*.py")})
KINDS = [kind for group in GROUPS for kind in group]


def because(kind: Reason) -> Because:
    """With some details; their names in order, and a number where the text formats one."""
    return kind(**{name: 64.0 if f"{{{name}:" in kind.text else f"<{name}>" for name in kind.fields})


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text()))


def test_every_group_is_in_the_list() -> None:
    assert set(GROUPS) == set(Reason.__subclasses__())


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_reason_says_what_it_means(kind: Reason) -> None:
    assert kind.heading
    assert kind.heading == kind.heading.strip()
    assert kind.text == kind.text.strip() != ""
    assert kind.meaning.endswith(".")
    assert kind.fix == "" or kind.fix.endswith(".")


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_text_names_every_detail(kind: Reason) -> None:
    text = str(because(kind))
    assert because(kind).kind is kind
    for name in kind.fields:
        assert f"<{name}>" in text or "64" in text


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_details_have_to_be_those_of_the_text(kind: Reason) -> None:
    details = dict(because(kind).details)
    with pytest.raises(TypeError, match=f"{kind} takes .*; got .*unknown_detail"):
        kind(**details, unknown_detail=1)
    for name in kind.fields:
        with pytest.raises(TypeError, match=f"{kind} takes .*{name}"):
            kind(**{key: x for key, x in details.items() if key != name})


def test_no_two_reasons_have_the_same_text() -> None:
    assert [text for text, count in Counter(kind.text for kind in KINDS).items() if count > 1] == []


def test_a_reason_by_hand() -> None:
    assert str(OptionReason.TOO_NARROW(k=8, n=32, min_features=64)) == "K=8, N=32: below min_features=64"
    assert str(OptionReason.EXCLUDED(pattern="head")) == "excluded by 'head'"
    assert WeightReason.COMPUTED() == WeightReason.COMPUTED() != WeightReason.GIVEN()
