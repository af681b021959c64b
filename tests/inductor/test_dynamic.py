"""Shapes that vary from call to call, are empty, or are none that tensor cores take.

tests/gpu/test_bad_days_cuda.py has the same on tensor cores, which takes `profit="always"`: the models are small.
"""

from __future__ import annotations

import pytest

from tests.support.shapes import Narrow, Siblings, assert_as_written, compiled_at, every_recipe, narrow, siblings

pytestmark = pytest.mark.compiles


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
def test_no_length_is_compiled_that_eager_does_not_compile(dynamic: bool | None, train: bool) -> None:
    expected = compiled_at(lambda gm, inputs: gm.forward, train, dynamic)
    assert len(expected) in (3, 4)
    assert compiled_at(every_recipe, train, dynamic) == expected


def test_a_model_may_see_an_empty_batch_first() -> None:
    assert_as_written(Siblings(), siblings, (0, 64), (3, 64))


def test_features_that_are_fewer_than_16_or_no_multiple_of_it() -> None:
    assert_as_written(Narrow(), narrow, (5, 17))
