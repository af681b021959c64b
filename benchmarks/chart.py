"""The front page's figures: speed and memory against bf16, from the committed results of benchmarks.train_step and
benchmarks.inference.

    python -m benchmarks.chart        # draws docs/results.png, prints the table that README.md has

Every figure is a ratio against bf16 Inductor in the same run. Nothing is measured here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS

DOCS = Path(__file__).parent.parent / "docs"
DEFAULT = "mixed"  # the recipe that runs if none is named
CASES = {
    "training step, 8,192 tokens": "train_step_llama",
    "training step, 1,024 tokens": "train_step_llama-small-m",
    "prefill, 8,192 tokens": "inference_llama-prefill-2x4096",
    "decode, 1 sequence": "inference_llama-decode-1-graph",
    "decode, 16 sequences": "inference_llama-decode-16-graph",
    "generate(), 1 sequence": "inference_generate",
}
SERIES = ("mixed", "fastest", "torchao")
LABELS = {"mixed": "fp8fx, default recipe", "fastest": "fp8fx, fastest recipe", "torchao": "torchao, fastest recipe"}
COLORS = {"mixed": "#8fb8de", "fastest": "#1f5fa8", "torchao": "#b8b8b8"}
TEXT = {"mixed": "black", "fastest": "white", "torchao": "black"}


@dataclass(frozen=True)
class Figure:
    """One contender against bf16 Inductor.

    Attributes:
        recipe: its recipe.
        speed: bf16's time over its own; higher is better.
        memory: its memory over bf16's; lower is better. Of a training step the peak, of inference the weights that
            stay.
    """

    recipe: str
    speed: float
    memory: float


def _read(name: str) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return results


def _memory(case: str, contender: Mapping[str, float]) -> float:
    if case.startswith("train_step"):
        return contender["peak_gib"]
    return contender.get("released_gib", contender["weights_gib"])  # of older results: without the originals


def _fastest(figures: Iterable[Figure]) -> Figure:
    return max(figures, key=lambda figure: figure.speed)


def figures(case: str) -> dict[str, Figure]:
    """The default recipe, our fastest and torchao's fastest of one case, by SERIES."""
    contenders = _read(case)["contenders"]
    bf16 = contenders.pop("bf16")
    ours, torchao = {}, {}
    for name, contender in contenders.items():
        recipe = name.removeprefix("torchao ")
        group = ours if recipe == name else torchao
        group[recipe] = Figure(recipe, bf16["ms"] / contender["ms"], _memory(case, contender) / _memory(case, bf16))
    return {"mixed": ours[DEFAULT], "fastest": _fastest(ours.values()), "torchao": _fastest(torchao.values())}


def rows() -> list[tuple[str, ...]]:
    """The table: a case, its speeds, its memory."""
    table = []
    for title, case in CASES.items():
        found = figures(case)
        mixed, fastest, torchao = (found[name] for name in SERIES)
        speeds = (
            f"{mixed.speed:.2f}x",
            f"**{fastest.speed:.2f}x** `{fastest.recipe}`",
            f"{torchao.speed:.2f}x {torchao.recipe}",
        )
        table.append((title, *speeds, *(f"{found[name].memory:.2f}x" for name in SERIES)))
    return table


def caption() -> str:
    """Device, versions and dates of the runs.

    Raises:
        ValueError: the runs differ in more than their dates.
    """
    environments = [_read(case)["environment"] for case in CASES.values()]
    dates = sorted({environment.pop("date") for environment in environments})
    first = environments[0]
    if any(environment != first for environment in environments):
        raise ValueError(
            f"the runs of {', '.join(CASES.values())} are not of one device and its versions; chart runs that are"
        )
    versions = ", ".join(f"{package} {first[package]}" for package in ("torch", "triton", "torchao"))
    return f"{first['device']}, CUDA {first['cuda']}, {versions}, {' and '.join(dates)}"


def table() -> str:
    """README.md's table."""
    headers = ("against bf16", *(f"{value}: {name}" for value in ("speed", "memory") for name in SERIES))
    lines = [headers, ["---"] * len(headers), *rows()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(path: Path) -> None:
    """Draws speed and memory of every case, with bf16 as a line at 1."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    found = {title: figures(case) for title, case in CASES.items()}
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 5.6), sharey=True)
    height = 0.8 / len(SERIES)
    for axes, value, title in zip(
        panels, ("speed", "memory"), ("speed, higher is better", "memory, lower is better"), strict=True
    ):
        for index, name in enumerate(SERIES):
            values = [getattr(row[name], value) for row in found.values()]
            places = [place + (index - 1) * height for place in range(len(found))]
            axes.barh(places, values, height, color=COLORS[name], label=LABELS[name])
            for x, y in zip(values, places, strict=True):
                axes.text(0.02, y, f"{x:.2f}x", va="center", fontsize=8, color=TEXT[name])
        axes.axvline(1, color="black", linewidth=1, linestyle="--")
        axes.set(title=title, xlabel="bf16 Inductor = 1x")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(found)), found)
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=len(SERIES), loc="upper center", frameon=False)
    figure.text(0.5, 0.01, caption(), ha="center", fontsize=8, color="#555555")
    figure.tight_layout(rect=(0, 0.03, 1, 0.94))
    figure.savefig(path, dpi=120)


def main() -> None:
    """Draws the chart and prints the table."""
    draw(DOCS / "results.png")
    print(table(), caption(), sep="\n\n")


if __name__ == "__main__":
    main()
