"""The three ways in, and what the script says about them."""

from __future__ import annotations

import re

import pytest

from examples.three_ways import main


@pytest.mark.compiles
def test_three_ways(capsys: pytest.CaptureFixture[str]) -> None:
    main()
    printed = capsys.readouterr().out
    assert "3 of 5 matmuls rewritten" in printed
    assert printed.count("activation times activation") == 2
    errors = re.findall(r"(compile|convert): relative error ([\d.]+)", printed)
    assert [name for name, _ in errors] == ["compile", "convert"]
    assert all(0 < float(error) < 0.1 for _, error in errors)
