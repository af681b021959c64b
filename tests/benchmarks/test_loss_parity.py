"""What docs/training.md says of loss parity is what the committed runs hold, and can be plotted from them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import digits, loss_parity
from benchmarks.harness import RESULTS

DOCS = Path(__file__).parents[2] / "docs"


def test_the_means() -> None:
    assert loss_parity.smoothed([4.0, 2.0, 3.0, 1.0], 2) == [3.0, 2.5, 2.0]


def test_the_page_has_the_figures_of_the_runs() -> None:
    text = (DOCS / "training.md").read_text().replace("`", "")
    found = [*loss_parity.gpt_rows(), *loss_parity.digits_rows()]
    assert len(found) == 6
    for row in found:
        assert f"\n| {' | '.join(row)} |\n".replace("  ", " ") in text
    where = json.loads((RESULTS / "digits.json").read_text())
    assert re.search(rf"One {where['device']}, torch\s{re.escape(where['torch'])}, {where['date']}\.", text)
    for name in loss_parity.GPT:
        where = json.loads((RESULTS / f"train_gpt_{name}.json").read_text())
        assert f"One {where['device']}, torch {where['torch']}, {where['date']}." in text
        assert "output" not in where


def test_the_digits_of_the_recipes_are_as_good_as_those_of_float32() -> None:
    found = {name: [run["accuracy"] for run in runs] for name, runs in loss_parity.digits().items()}
    assert tuple(found) == digits.RUNS
    assert all(len(accuracies) == 3 for accuracies in found.values())
    for accuracies in found.values():
        assert all(abs(a - b) <= 0.5 for a, b in zip(accuracies, found["float32"], strict=True))
    assert all(len(run["losses"]) == digits.STEPS for runs in loss_parity.digits().values() for run in runs)


@pytest.mark.slow
def test_the_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(loss_parity, "DOCS", tmp_path)
    loss_parity.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits.png", "loss_parity.png"]
    assert all((DOCS / path.name).is_file() and path.stat().st_size > 10_000 for path in tmp_path.iterdir())
    assert len(capsys.readouterr().out.splitlines()) == 2 * (2 + 3)
