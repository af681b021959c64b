"""The command: rows for what passes, what does not and what crashes, its exit code, and the file it writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the demo extra is not installed", exc_type=ModuleNotFoundError)

from tests.zoo import __main__ as command
from tests.zoo.coverage import markdown
from tests.zoo.models import ZOO

TIMES = {"output": 8.0, "row": 12.0, "gradient": 11.0}
ACCURACY = {"output_db": 20.0, "gradient_db": 17.0, "times": TIMES, "where": "weight"}


def verdict(name: str, **changes: Any) -> dict[str, Any]:
    runs = [
        {"kind": kind, "recipe": recipe, "accuracy": ACCURACY, "graphs": 1, "compilations": 1, "expected": 1}
        for kind in ("inference", "training")
        for recipe in ("mixed", "global")
    ]
    good = {
        "name": name,
        "seen": 9,
        "rewritten": 9,
        "refused": {},
        "share": 0.9,
        "weights_share": 1.0,
        "half": ACCURACY,
        "runs": runs,
        "seconds": 1.0,
        "problems": [],
    }
    return good | changes


def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, verdicts: dict[str, dict[str, Any]], *arguments: str) -> str:
    """What is written as coverage.md."""
    written = tmp_path / "coverage.md"
    monkeypatch.setattr(command, "COVERAGE", written)
    monkeypatch.setattr(command, "_judged", lambda name, *_: verdicts.get(name, verdict(name)))
    monkeypatch.setattr(sys, "argv", ["zoo", "--device", "cpu", *arguments])
    try:
        command.main()
    finally:
        text = written.read_text() if written.exists() else ""
    return text


def test_all_pass(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(monkeypatch, tmp_path, {}, "--json", str(tmp_path / "all.json"))
    assert f"Inductor compiled them. Written by `python -m tests.zoo` on a CPU, torch {torch.__version__}" in " ".join(text.split())
    assert f"{len(ZOO)} of {len(ZOO)} pass" in " ".join(text.split())
    assert all(text.count(f"| {name} ") == 2 for name in ZOO)
    assert [one["name"] for one in json.loads((tmp_path / "all.json").read_text())] == list(ZOO)
    assert "GPT-2: passes, 1 s" in capsys.readouterr().out


CRASHED = {"name": "BERT", "error": "crashed (exit code 1): Error: no"}
WRONG = verdict("BERT", problems=["inference by mixed: no"])


@pytest.mark.parametrize("bad", [CRASHED, WRONG], ids=["crashed", "wrong"])
def test_one_that_fails_is_a_row_and_an_exit_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bad: dict[str, Any]) -> None:
    with pytest.raises(SystemExit, match=f"1 of {len(ZOO)} do not pass: BERT"):
        run(monkeypatch, tmp_path, {"BERT": bad})
    text = (tmp_path / "coverage.md").read_text()
    assert f"{len(ZOO) - 1} of {len(ZOO)} pass" in " ".join(text.split())
    assert text.count("no |") == 2 - ("problems" in bad)


def test_some_alone_write_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, tmp_path, {}, "--only", "T5", "GPT-2") == ""
    assert capsys.readouterr().out.startswith(("T5: passes", "GPT-2: passes"))


def test_what_falls_short_is_named() -> None:
    text = markdown(
        [verdict("Mixtral", weights_share=0.2, refused={"the weight is 3-D, not 2-D": 4, "in no graph": 0})], "a CPU", True, "rule"
    )
    assert "Below 95 % of weights: Mixtral." in text
    assert "4 the weight is 3-D; in no graph" in text
    assert "without Inductor. Written by `python -m tests.zoo --eager` on a CPU" in " ".join(text.split())


def test_a_process_that_crashes_is_an_error_with_its_last_line(capfd: pytest.CaptureFixture[str]) -> None:
    found = command._judged("no such model", "cpu", 1, 60.0, False)
    assert found == {"name": "no such model", "error": "crashed (exit code 1): KeyError: 'no such model'"}
    assert command._judged("GPT-2", "cpu", 1, 0.01, False) == {"name": "GPT-2", "error": "not done after 0 s"}
