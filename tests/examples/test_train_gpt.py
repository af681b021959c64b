"""examples/train_gpt.py at a toy size."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

pytest.importorskip("tqdm", reason="the demo extra is not installed")

SCRIPT = Path(__file__).parents[2] / "examples" / "train_gpt.py"


def test_it_learns_and_writes_its_losses(tmp_path: Path) -> None:
    output = tmp_path / "losses.json"
    toy = {"steps": 12, "width": 64, "layers": 1, "context": 32, "batch": 4}
    arguments = [str(part) for name, size in toy.items() for part in (f"--{name}", size)]
    losses = runpy.run_path(str(SCRIPT))["main"]([*arguments, "--recipe", "global", "--output", str(output)])
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.2
    written = json.loads(output.read_text())
    assert (written["losses"], written["recipe"], written["steps"]) == (losses, "global", 12)
