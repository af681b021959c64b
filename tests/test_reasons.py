"""The table of reasons, each member of it."""

from __future__ import annotations

import ast
import pickle
from collections import Counter
from pathlib import Path

import pytest

from fp8fx.reasons import GROUPS, Because, OptionReason, Reason, WeightReason

ROOT = Path(__file__).parent.parent
SOURCES = sorted({*(ROOT / "fp8fx").rglob("*.py"), *(ROOT / "passes").rglob("*.py")})
KINDS = [kind for group in GROUPS for kind in group]


def because(kind: Reason) -> Because:
    """With some details; their names in order, and a number where the text formats one."""
    return kind(**{name: 64.0 if f"{{{name}:" in kind.text else f"<{name}>" for name in kind.fields})


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


USES = {
    f"{node.value.id}.{node.attr}"
    for path in SOURCES
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
}


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_something_gives_this_reason(kind: Reason) -> None:
    assert str(kind) in USES


TEXTS = {"reason", "reasons", "remark", "remarks", "text", "meaning", "fix"}
"""What the texts that a user reads are called, where they are attributes."""


def is_text(node: ast.AST) -> bool:
    """Whether it is such a text, as `row.reason` or `str(refusal.reason)`."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "str":
        return any(map(is_text, node.args))
    return isinstance(node, ast.Attribute) and node.attr in TEXTS


def steering(source: str) -> list[str]:
    """The places where a text that the user reads steers the program: it is compared, searched or taken apart."""
    places = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            by_text = not all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops)
            steers = by_text and any(map(is_text, (node.left, *node.comparators)))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            # `format` makes a text; what a list can do, too, is no sign of one.
            takes_apart = hasattr(str, node.func.attr) and node.func.attr != "format"
            of_text = is_text(node.func.value) and takes_apart and not hasattr(list, node.func.attr)
            searched = ast.unparse(node.func.value) == "re" and any(map(is_text, node.args))
            steers = of_text or searched
        elif isinstance(node, ast.Match):
            steers = is_text(node.subject)
        else:
            continue
        if steers:
            places.append(ast.unparse(node))
    return places


PROGRAMS = [
    *SOURCES,
    *(path for folder in ("benchmarks", "examples") for path in sorted((ROOT / folder).rglob("*.py"))),
]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_compares_texts(path: Path) -> None:
    assert steering(path.read_text()) == []


@pytest.mark.parametrize(
    ("source", "steers"),
    [
        ("refusal.reason == COMPUTED", True),
        ("COMPUTED != str(refusal.reason)", True),
        ("'a router' in row.reason", True),
        ("row.remark in ('', 'x')", True),
        ("row.reason.startswith('a router')", True),
        ("str(row.reason).partition(':')", True),
        ("refusal.reason.kind.text == COMPUTED", True),
        ("re.match('FP8', row.reason)", True),
        ("row.reason is None", False),
        ("row.reason or row.remark", False),
        ("refusal.reason.kind is WeightReason.COMPUTED", False),
        ("rewrite.remarks.append(because)", False),
        ("rewrite.remarks.get(node, ())", False),
    ],
)
def test_the_reader_of_comparisons_reads(source: str, steers: bool) -> None:
    assert bool(steering(source)) == steers


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_saved_report_finds_its_kind_by_name(kind: Reason) -> None:
    """Its text may be another one when the report is read."""
    saved = pickle.dumps(kind)
    assert kind.text.encode() not in saved
    assert pickle.loads(saved) is kind
