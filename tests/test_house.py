"""The order of the house: short files, and no compiler in a test that does not say so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._inductor.cpp_builder import CppBuilder

from tests.support import compilers

TESTS = Path(__file__).parent
LONGEST = 500


def test_no_file_of_the_tests_is_too_long_to_read() -> None:
    lines = {str(path.relative_to(TESTS)): len(path.read_text().splitlines()) for path in TESTS.rglob("*.py")}
    assert "test_house.py" in lines
    assert {name: count for name, count in lines.items() if count >= LONGEST} == {}


@pytest.mark.slow
def test_a_test_that_compiles_without_saying_so_fails() -> None:
    for compiler in (lambda: torch.compile(lambda x: x + 1)(torch.ones(2)), lambda: CppBuilder.build(None)):  # type: ignore[arg-type]
        with pytest.raises(pytest.fail.Exception, match="mark it `compiles`"):
            compiler()
        assert compilers.reached
        compilers.reached.clear()


@pytest.mark.compiles
def test_one_that_says_so_compiles() -> None:
    assert torch.compile(lambda x: x + 1)(torch.ones(2)).tolist() == [2, 2]
