"""The front page's quickstart is examples/quickstart.py, and prints what the page says."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "quickstart.py"


def section() -> str:
    """The quickstart's part of README.md."""
    found = re.search(r"^## Quickstart$.*?(?=^## )", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert found
    return found[0]


def block(language: str) -> str:
    """The one block of that language in the section."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", section(), re.DOTALL | re.MULTILINE)
    return str(found)


def lines(text: str) -> list[str]:
    """Without spaces at the ends of lines, in which a table's last column is padded."""
    return [line.rstrip() for line in text.splitlines()]


def test_the_block_is_the_script() -> None:
    assert SCRIPT.read_text().partition('"""\n\n')[2] == block("python")


@pytest.mark.compiles
def test_it_prints_what_the_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(SCRIPT))
    *report, error = lines(capsys.readouterr().out)
    *shown, shown_error = lines(block("text"))
    assert report == shown
    (percent,), (shown_percent,) = (re.findall(r"^relative error: ([\d.]+)%$", line) for line in (error, shown_error))
    assert float(percent) == pytest.approx(float(shown_percent), abs=0.2)  # kernels of another CPU sum in another order
