"""A backend that rewrites graphs and leaves them to run as they are: Inductor takes seconds for each."""

from __future__ import annotations

import pytest


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fp8fx.lowering.compile_fx", lambda gm, inputs, *inner, config_patches: gm.forward)
