"""Loss parity of training in FP8: a plot and a table from what examples/train_gpt.py wrote.

python examples/train_gpt.py --recipe none --output benchmarks/results/train_gpt_none.json      # and mixed, and global
python -m benchmarks.loss_parity        # needs matplotlib
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib as mpl
from tabulate import tabulate

mpl.use("Agg")
from matplotlib import pyplot

RESULTS, PLOT = Path(__file__).parent / "results", Path(__file__).parent.parent / "docs" / "loss_parity.png"
NAMES = {"none": "bf16 (no FP8)", "mixed": "mixed", "global": "global"}
WINDOW = 100  # steps that a smoothed loss averages


def smoothed(losses: list[float]) -> list[float]:
    """The mean of the last WINDOW losses, for each step from the WINDOWth on."""
    return [sum(losses[i - WINDOW : i]) / WINDOW for i in range(WINDOW, len(losses) + 1)]


def main() -> None:
    """Writes docs/loss_parity.png and prints the table."""
    losses = {recipe: json.loads((RESULTS / f"train_gpt_{recipe}.json").read_text())["losses"] for recipe in NAMES}
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for recipe, name in NAMES.items():
        axes.plot(range(WINDOW, len(losses[recipe]) + 1), smoothed(losses[recipe]), label=name, linewidth=1)
    axes.set(xlabel="step", ylabel=f"loss in nats a byte, mean of {WINDOW} steps", yscale="log")
    axes.legend()
    figure.tight_layout()
    figure.savefig(PLOT, dpi=120)
    final = {recipe: smoothed(values)[-1] for recipe, values in losses.items()}
    rows = [(NAMES[recipe], f"{loss:.4f}", f"{loss / final['none'] - 1:+.2%}") for recipe, loss in final.items()]
    print(tabulate(rows, ("", f"loss, last {WINDOW} steps", "against bf16")))


if __name__ == "__main__":
    main()
