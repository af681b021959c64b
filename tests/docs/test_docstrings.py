"""Every example in a docstring of the package prints what it says."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import fp8fx

ROOT = Path(__file__).parent.parent.parent
FILES = [
    pytest.param(path.relative_to(ROOT), marks=[pytest.mark.compiles] if ">>> compiled = " in path.read_text() else [])
    for path in sorted({*(ROOT / "fp8fx").rglob("*.py"), *(ROOT / "fp8fx" / "passes").rglob("*.py")})
    if ">>> " in path.read_text()
]
PUBLIC = [name for name in fp8fx.__all__ if callable(getattr(fp8fx, name))]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_an_example(name: str) -> None:
    assert ">>> " in (getattr(fp8fx, name).__doc__ or "")


@pytest.mark.parametrize("path", FILES, ids=str)
def test_the_examples_of(path: Path) -> None:
    module = importlib.import_module(".".join(path.with_suffix("").parts).removesuffix(".__init__"))
    results = doctest.testmod(module)
    assert results.attempted
    assert not results.failed  # what it printed instead is on standard output
