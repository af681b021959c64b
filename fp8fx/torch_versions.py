"""The releases of torch that fp8fx is tested with."""

from __future__ import annotations

import functools
import warnings

import torch

from fp8fx.errors import FP8Warning

__all__ = ["NEWEST", "OLDEST", "warn_of_untested"]

OLDEST, NEWEST = (2, 11), (2, 15)
"""The releases of torch that the tests have seen."""


@functools.cache
def warn_of_untested() -> None:
    """Says once if the running torch is newer than those that were tested."""
    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if release > NEWEST:
        warnings.warn(
            f"fp8: torch {torch.__version__} is newer than {NEWEST[0]}.{NEWEST[1]}, the newest that fp8fx was tested "
            "with; fp8fx.explain(model, *args) says whether it still sees every linear",
            FP8Warning,
            stacklevel=3,
        )
