"""Stops a test that reaches a compiler without the marker `compiles`.

`make quick` leaves out what is marked, so a test that forgot its marker would make it slow, or break it on a machine
without a compiler. Three doors are closed to the others: the one to Inductor's code generation, the one by which code
from its caches on disk comes back, and the C++ compiler's. Triton compiles on a GPU alone, whose tests have the marker
`gpu`. Nothing is closed in other processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn
from unittest import mock

import pytest

MESSAGE = (
    "this test reached {}: mark it `compiles`, or run its graph by tests.support.agreement.Lowered "
    "or tests.support.capture.Capture"
)

reached: list[str] = []
"""The compilers that the running test has been kept from; an error on another thread, or one that is caught, would go
unseen."""


@contextmanager
def closed() -> Iterator[None]:
    """Nothing is compiled in here, and who tries fails."""
    from torch._inductor import (  # a second, which a test that never runs does not cost
        compile_fx,
        cpp_builder,
        output_code,
    )

    reached.clear()
    with (
        mock.patch.object(compile_fx, "_compile_fx_inner", _fail("Inductor")),
        mock.patch.object(output_code.CompiledFxGraph, "post_compile", _fail("Inductor")),
        mock.patch.object(cpp_builder.CppBuilder, "build", _fail("the C++ compiler")),
    ):
        yield


def _fail(compiler: str) -> Any:
    def fail(*args: Any, **kwargs: Any) -> NoReturn:
        reached.append(compiler)
        pytest.fail(MESSAGE.format(compiler))

    return fail
