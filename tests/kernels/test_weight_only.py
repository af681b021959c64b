"""One row times an FP8 weight: what the kernel is launched with, and, in Triton's interpreter, what it computes."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fp8fx.config import RECIPES, Cast
from fp8fx.formats import E4M3, E5M2
from fp8fx.kernels import scaled_mm, weight_only
from fp8fx.numerics import Quantized, quantize

ROUNDING = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 6e-3}
SIZES = [(1, 1), (7, 33), (16, 64), (5, 100), (3, 2048), (4, 2049), (2, 4100), (130, 48)]  # N, K: blocks of 2048 at most

dtypes = pytest.mark.parametrize("dtype", ROUNDING, ids=str)
scales = pytest.mark.parametrize("recipe", ["global", "rowwise"], ids=["one scale", "a scale a row"])


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernel runs in Triton's interpreter, on the CPU; what it writes to is poisoned."""
    pytest.importorskip("triton", reason="Triton is installed on Linux x86-64 alone")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for name in ("triton.language.math", "triton.language.standard"):  # whose helpers were made when Triton was imported
        assert name in sys.modules or importlib.import_module(name)
    monkeypatch.delitem(sys.modules, "fp8fx.kernels.gemv", raising=False)
    monkeypatch.setattr(weight_only, "wrap_triton", lambda kernel: kernel)
    new_empty = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda x, *shape, **options: new_empty(x, *shape, **options).fill_(math.nan))
    yield
    sys.modules.pop("fp8fx.kernels.gemv", None)


def cast(recipe: str) -> Cast:
    forward = RECIPES[recipe].forward
    assert forward is not None
    return forward.rhs


def exact(x: Tensor, weight: Quantized, bias: Tensor | None) -> Tensor:
    assert weight.scale is not None
    out = x.double() @ (weight.data.double() * weight.scale.double()).t()
    return out if bias is None else out + bias.double()


def error(x: Tensor, reference: Tensor) -> float:
    return float((x.double() - reference).norm() / reference.norm())
