"""Every example in a docstring of the package prints what it says."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
FILES = [
    path.relative_to(ROOT)
    for path in sorted({*(ROOT / "fp8fx").rglob("*.py"), *(ROOT / "fp8fx" / "passes").rglob("*.py")})
    if ">>> " in path.read_text()
]


def test_there_are_examples() -> None:
    assert Path("fp8fx/report.py") in FILES


@pytest.mark.parametrize("path", FILES, ids=str)
def test_the_examples_of(path: Path) -> None:
    module = importlib.import_module(".".join(path.with_suffix("").parts).removesuffix(".__init__"))
    results = doctest.testmod(module)
    assert results.attempted
    assert not results.failed  # what it printed instead is on standard output
