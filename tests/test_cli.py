"""`python -m fp8fx`."""

from __future__ import annotations

import pytest
import torch

from fp8fx.__main__ import main


def test_it_says_what_auto_means_here(capsys: pytest.CaptureFixture[str]) -> None:
    main()
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    assert "mixed, global" in printed
    assert printed.splitlines()[4].split() == ["executor", "on", "cpu", "simulated"]
