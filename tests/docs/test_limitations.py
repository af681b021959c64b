"""docs/limitations.md has the table of reasons as the package has it."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from fp8fx.reasons import GROUPS
from fp8fx.reasons.docs_page import BEGIN, END, markdown, updated

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "limitations.md"


def test_the_page_has_the_table_s_reasons() -> None:
    assert PAGE.read_text() == updated(PAGE.read_text()), "run: python -m fp8fx.reasons docs/limitations.md"


def test_every_kind_is_a_row_of_three_cells() -> None:
    lines = markdown().splitlines()
    rows = [line for line in lines if line.startswith("| ") and line != "| reason | meaning | what helps |"]
    assert len(rows) == sum(len(group) for group in GROUPS)
    assert {row.count("|") for row in rows} == {4}
    assert "| excluded by *pattern* |" in markdown()
    assert not re.search(r"[{}]", markdown())


def test_the_links_inside_the_page_lead_somewhere() -> None:
    text = PAGE.read_text()
    anchors = {"#" + title.lower().replace(" ", "-") for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
    assert set(re.findall(r"\]\((#[^)]*)\)", text)) <= anchors


def test_the_command_writes_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    monkeypatch.setattr(sys, "argv", ["reasons", str(page)])
    runpy.run_module("fp8fx.reasons", run_name="__main__")
    assert page.read_text() == f"before\n{BEGIN}\n\n{markdown()}\n\n{END}\nafter\n"
    monkeypatch.setattr(sys, "argv", ["reasons"])
    runpy.run_module("fp8fx.reasons", run_name="__main__")
    assert capsys.readouterr().out == markdown() + "\n"


@pytest.mark.parametrize("page", ["", BEGIN, END + BEGIN, BEGIN + END + END, BEGIN + BEGIN + END])
def test_a_page_needs_both_markers_once(page: str) -> None:
    with pytest.raises(ValueError, match="needs each of these lines once"):
        updated(page)
