"""What every test starts from: a fixed seed, one thread, and no compiled code left over from the test before."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)  # the tensors are small: more threads cost more than they do, most of all on a busy machine


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    if "torch._dynamo" in sys.modules:  # importing it takes a second, resetting it nothing
        sys.modules["torch._dynamo"].reset()
