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
from tests.zoo.coverage import markdown, record
from tests.zoo.models import ZOO

TIMES = {"output": 8.0, "row": 12.0, "gradient": 11.0}
ACCURACY = {"output_db": 20.0, "gradient_db": 17.0, "times": TIMES, "where": "weight"}
COVERAGE = {"matmuls": 13, "linears": 9, "rewritten": 9, "refused": {}, "share": 0.9, "weights_share": 1.0}


def verdict(name: str, **changes: Any) -> dict[str, Any]:
    accuracy, done = (
        {"inference": ACCURACY | {"gradient_db": None, "output_db": 21.0}, "training": ACCURACY},
        {"graphs": 1, "expected": 2},
    )
    runs = [
        {
            "kind": kind,
            "recipe": recipe,
            "coverage": COVERAGE,
            "accuracy": accuracy[kind],
            "compilations": count,
            **done,
        }
        for kind in ("inference", "training")
        for recipe, count in (("mixed", 2), ("global", 3))
    ]
    return {"name": name, "half": ACCURACY, "runs": runs, "seconds": 1.0, "problems": []} | changes


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
    assert f"Inductor compiled them. Written by `python -m tests.zoo` on a CPU, torch {torch.__version__}" in " ".join(
        text.split()
    )
    assert f"{len(ZOO)} of {len(ZOO)} pass" in " ".join(text.split())
    assert all(text.count(f"| {name} ") == 3 for name in ZOO)
    written = json.loads((tmp_path / "all.json").read_text())
    assert (written["device"], written["eager"], written["torch"]) == ("a CPU", False, torch.__version__)
    assert written["verdicts"] == [verdict(name) for name in ZOO]
    assert "GPT-2: passes, 1 s" in capsys.readouterr().out


CRASHED = {"name": "BERT", "error": "crashed (exit code 1): Error: no"}
WRONG = verdict("BERT", problems=["inference by mixed: no"])


@pytest.mark.parametrize("bad", [CRASHED, WRONG], ids=["crashed", "wrong"])
def test_one_that_fails_is_a_row_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bad: dict[str, Any]
) -> None:
    with pytest.raises(SystemExit, match=f"1 of {len(ZOO)} do not pass: BERT"):
        run(monkeypatch, tmp_path, {"BERT": bad})
    text = (tmp_path / "coverage.md").read_text()
    assert f"{len(ZOO) - 1} of {len(ZOO)} pass" in " ".join(text.split())
    assert text.count("no |") == (1 if "problems" in bad else 3)


def test_some_alone_write_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path, {}, "--only", "T5", "GPT-2") == ""
    assert capsys.readouterr().out.startswith(("T5: passes", "GPT-2: passes"))


def page(*verdicts: dict[str, Any]) -> str:
    """As one line."""
    here, there = record(verdicts, "a CPU", True), record([verdict("T5"), CRASHED], "a GPU", False)
    return " ".join(markdown(here, there, "gpu.json", "rule").split())


def test_the_page_says_how_it_was_written_and_what_tensor_cores_said() -> None:
    text = page(verdict("GPT-2"))
    assert "without Inductor. Written by `python -m tests.zoo --eager` on a CPU, torch" in text
    assert "1 of 1 pass. Through Inductor on a GPU, torch" in text
    assert "1 of 2 pass ([verdicts](gpu.json))" in text


def test_inference_and_training_and_both_recipes_are_told_apart() -> None:
    text = page(verdict("GPT-2"))
    assert "| GPT-2 | 9 of 9 | 9 of 13 | 100.0% | 90.0% | |" in text
    assert (
        "| GPT-2 | 20.0 / 21.0 / 21.0 | 20.0 / 20.0 / 20.0 | 17.0 / 17.0 / 17.0 | 8.0 | 12.0 | 11.0 | passes |" in text
    )
    assert "| GPT-2 | 1 / 1 | 1 / 1 | 2 / 3 / 2 | 2 / 3 / 2 |" in text
    assert "with 95% of weights or more; these, which cannot, with: Mixtral-eager (24%), Mixtral-batched (24%)." in text


def test_where_the_runs_of_one_differ_the_worst_is_shown() -> None:
    assert "The four runs of each architecture agree in all of this." in page(verdict("GPT-2"))
    worse = verdict("BERT")
    worse["runs"][2]["coverage"] = COVERAGE | {
        "rewritten": 5,
        "weights_share": 0.2,
        "refused": {"the weight is 3-D, not 2-D": 4, "no": 0},
    }
    text = page(verdict("GPT-2"), worse)
    assert "agree in all of this, but for those of BERT, where it is of the worst." in text
    assert "| BERT | 5 of 9 | 5 of 13 | 20.0% | 90.0% | 4 the weight is 3-D; no |" in text


@pytest.mark.slow
def test_a_process_that_crashes_is_an_error_with_its_last_line(capfd: pytest.CaptureFixture[str]) -> None:
    found = command._judged("no such model", "cpu", 1, 60.0, False)
    assert found == {"name": "no such model", "error": "crashed (exit code 1): KeyError: 'no such model'"}
    assert command._judged("GPT-2", "cpu", 1, 0.01, False) == {"name": "GPT-2", "error": "not done after 0 s"}
