"""Inductor's kernels as users get them: over vectors of the CPU, which other tests leave out to be quick."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch._inductor import config


@pytest.fixture(autouse=True)
def _vectors() -> Iterator[None]:
    with config.patch({"cpp.simdlen": None}):
        yield
