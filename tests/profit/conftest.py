"""A device for the tests of this folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fp8fx.profit import measure, remembered
from tests.support.figures import Timer


@pytest.fixture(autouse=True)
def _precision() -> Iterator[None]:
    """How float32 is multiplied goes back to what it was, by both ways to say it: graphs are guarded on it."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32, matmul.fp32_precision
    yield
    matmul.allow_tf32, matmul.fp32_precision = before


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Timer:
    """A device that does nothing, with an empty folder of its own."""

    @contextlib.contextmanager
    def aside(device: torch.device) -> Iterator[None]:
        yield

    timer = Timer()
    monkeypatch.setattr(measure, "_gemm", timer)
    monkeypatch.setattr(measure, "_aside", aside)
    monkeypatch.setattr(remembered, "_figures", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU (80GB)")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setenv("FP8FX_CACHE_DIR", str(tmp_path / "cache"))
    return timer
