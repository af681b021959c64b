"""What every test starts from: a fixed seed, one thread, nothing compiled by the test before, and no compiler unless it
says so."""

from __future__ import annotations

import gc
import sys
from collections.abc import Generator, Iterator

import pytest
import torch
from hypothesis import settings

pytest.register_assert_rewrite("tests.support")  # whose assertions show values as those of the tests do

from tests.support import compilers, dynamo  # noqa: E402

# How many examples a property is tried on: by make quick, which takes the profile "quick", and by every other run.
settings.register_profile("quick", max_examples=20)
settings.register_profile("full", max_examples=200)
settings.load_profile("full")

MAY_COMPILE = ("compiles", "gpu", "zoo")

dynamo.spare()
torch.set_num_threads(1)  # the tensors are small: more threads cost more than they do, most of all on a busy machine


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    if "torch._dynamo" in sys.modules:  # importing it takes a second, resetting it nothing
        sys.modules["torch._dynamo"].reset()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Keeps a test and its fixtures, those of its module too, from compilers."""
    if any(item.get_closest_marker(marker) for marker in MAY_COMPILE):
        return (yield)
    with compilers.closed():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Fails a test that was kept from a compiler and did not notice."""
    result = yield
    if compilers.reached and not any(item.get_closest_marker(marker) for marker in MAY_COMPILE):
        pytest.fail(compilers.MESSAGE.format(compilers.reached[0]))
    return result


def pytest_collection_finish() -> None:
    """Has the garbage collector leave torch's modules and the tests alone, which are there to stay."""
    gc.collect()
    gc.freeze()
