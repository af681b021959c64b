"""Loss parity of training in FP8: plots and tables of what examples/train_gpt.py and benchmarks.digits wrote.

python examples/train_gpt.py --recipe none --output benchmarks/results/train_gpt_none.json      # and mixed, and global
python -m benchmarks.digits
python -m benchmarks.loss_parity        # writes docs/loss_parity.png and docs/digits.png, prints the tables
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.harness import RESULTS

DOCS = Path(__file__).parent.parent / "docs"
GPT = {"none": "bf16 (no FP8)", "mixed": "mixed", "global": "global"}
GPT_WINDOW, DIGITS_WINDOW = 100, 25  # steps that a smoothed loss averages


def smoothed(losses: list[float], window: int) -> list[float]:
    """The mean of the last `window` losses, for each step from the `window`th on."""
    return [sum(losses[i - window : i]) / window for i in range(window, len(losses) + 1)]


def gpt() -> dict[str, list[float]]:
    """The losses of each run of the GPT."""
    return {
        name: json.loads((RESULTS / f"train_gpt_{recipe}.json").read_text())["losses"] for recipe, name in GPT.items()
    }


def digits() -> dict[str, list[dict[str, Any]]]:
    """Accuracy and losses by run and seed of the digits."""
    written = json.loads((RESULTS / "digits.json").read_text())
    return {name: found for name, found in written.items() if isinstance(found, list)}


def gpt_rows() -> list[tuple[str, ...]]:
    """The mean of each run's last losses, and how far it is from the first run's."""
    final = {name: smoothed(losses, GPT_WINDOW)[-1] for name, losses in gpt().items()}
    base, *_ = final.values()
    return [
        (name, f"{loss:.4f}", f"{100 * (loss / base - 1):+.2f} %" if loss != base else "")
        for name, loss in final.items()
    ]


def digits_rows() -> list[tuple[str, ...]]:
    """The accuracy in percent of each run, by seed."""
    return [(name, *(f"{run['accuracy']:.2f}" for run in found)) for name, found in digits().items()]


def plot(path: Path, panels: dict[str, dict[str, list[float]]], window: int, unit: str) -> None:
    """Draws the smoothed losses of the runs, in a panel for each title."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (row,) = pyplot.subplots(1, len(panels), figsize=(8, 4.5), sharey=True, squeeze=False)
    for axes, (title, runs) in zip(row, panels.items(), strict=True):
        for name, losses in runs.items():
            axes.plot(range(window, len(losses) + 1), smoothed(losses, window), label=name, linewidth=1)
        axes.set(xlabel="step", title=title, yscale="log")
    row[0].set(ylabel=f"loss in {unit}, mean of {window} steps")
    row[-1].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Writes the plots and prints the tables."""
    seeds = [f"seed {run['seed']}" for run in digits()["float32"]]
    by_seed = {
        seed: {name: found[index]["losses"] for name, found in digits().items()} for index, seed in enumerate(seeds)
    }
    plot(DOCS / "loss_parity.png", {"": gpt()}, GPT_WINDOW, "nats a byte")
    plot(DOCS / "digits.png", by_seed, DIGITS_WINDOW, "nats an image")
    print(tabulate(gpt_rows(), ("", f"loss, last {GPT_WINDOW} steps", "against bf16"), disable_numparse=True))
    print(tabulate(digits_rows(), ("accuracy in %", *seeds), disable_numparse=True))


if __name__ == "__main__":
    main()
