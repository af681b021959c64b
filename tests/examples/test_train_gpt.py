"""examples/train_gpt.py at a toy size."""

from __future__ import annotations

import json
import runpy
from datetime import date
from pathlib import Path

import pytest
import torch

pytest.importorskip("tqdm", reason="the demo extra is not installed")

SCRIPT = Path(__file__).parents[2] / "examples" / "train_gpt.py"


@pytest.mark.compiles
def test_it_learns_and_writes_its_losses(tmp_path: Path) -> None:
    output = tmp_path / "losses.json"
    toy = {"steps": 12, "width": 64, "layers": 1, "context": 32, "batch": 4}
    arguments = [str(part) for name, size in toy.items() for part in (f"--{name}", size)]
    losses = runpy.run_path(str(SCRIPT))["main"]([*arguments, "--recipe", "global", "--output", str(output)])
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.2
    assert str(tmp_path) not in output.read_text()
    written = json.loads(output.read_text())
    day, triton = date.fromisoformat(written.pop("date")), written.pop("triton")
    assert 0 <= (date.today() - day).days <= 1
    assert triton is None or triton[0].isdigit()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    where = {"device": device, "torch": torch.__version__}
    parameters = (
        (256 + 32) * 64 + 5 * 2 * 64 + 12 * 64**2 + 9 * 64 - 2 * 2 * 64
    )  # embeddings, norms, a block's weights and biases
    assert written == {**where, **toy, "seed": 0, "recipe": "global", "parameters": parameters, "losses": losses}
