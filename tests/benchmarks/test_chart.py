"""The front page's figures are those of the committed results, and its chart can be drawn from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import chart

README = (Path(__file__).parents[2] / "README.md").read_text()


def write(folder: Path, name: str, device: str = "H100", **contenders: dict[str, float]) -> None:
    versions = {"device": device, "cuda": "13.0", "torch": "2.11.0", "triton": "3.6.0", "torchao": "0.18.0"}
    results = {"environment": {**versions, "date": "2026-01-01"}, "contenders": contenders}
    (folder / f"{name}.json").write_text(json.dumps(results))


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two cases of which every figure is known."""
    monkeypatch.setattr(chart, "RESULTS", tmp_path)
    monkeypatch.setattr(chart, "CASES", {"training": "train_step_one", "decode": "inference_one"})
    step = {
        "bf16": {"ms": 12.0, "peak_gib": 4.0},
        "torchao slow": {"ms": 24.0, "peak_gib": 4.0},
        "torchao fast": {"ms": 10.0, "peak_gib": 5.0},
        "mixed": {"ms": 8.0, "peak_gib": 3.0},
        "global": {"ms": 6.0, "peak_gib": 2.0},
    }
    call = {
        "bf16": {"ms": 1.0, "weights_gib": 2.0},
        "torchao PerRow": {"ms": 0.8, "weights_gib": 1.0},
        "mixed": {"ms": 0.5, "weights_gib": 3.0, "released_gib": 1.0},
    }
    write(tmp_path, "train_step_one", **step)
    write(tmp_path, "inference_one", **call)
    return tmp_path


@pytest.mark.usefixtures("results")
def test_ratios_are_against_bf16_of_the_same_run() -> None:
    assert chart.figures("train_step_one") == {
        "mixed": chart.Figure("mixed", 1.5, 0.75),
        "fastest": chart.Figure("global", 2.0, 0.5),
        "torchao": chart.Figure("fast", 1.2, 1.25),
    }


@pytest.mark.usefixtures("results")
def test_weights_are_those_that_stay_after_release() -> None:
    figures = chart.figures("inference_one")
    assert [figures[name].memory for name in chart.SERIES] == [0.5, 0.5, 0.5]


def test_runs_of_two_devices_are_not_charted_together(results: Path) -> None:
    assert chart.caption() == "H100, CUDA 13.0, torch 2.11.0, triton 3.6.0, torchao 0.18.0, 2026-01-01"
    write(results, "inference_one", device="H200")
    with pytest.raises(ValueError, match="not of one device"):
        chart.caption()


def test_the_front_page_has_the_figures_of_the_runs() -> None:
    assert f"\n{chart.table()}\n" in README
    assert chart.caption() in " ".join(README.split())


@pytest.mark.slow
def test_the_chart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert (chart.DOCS / "results.png").is_file()
    monkeypatch.setattr(chart, "DOCS", tmp_path)
    chart.main()
    assert (tmp_path / "results.png").stat().st_size > 10_000
    assert capsys.readouterr().out == f"{chart.table()}\n\n{chart.caption()}\n"
