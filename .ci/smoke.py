"""What must hold once the wheel is installed.

It runs from a folder without fp8fx, but with a package `passes` of the user's own.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import torch
from torch import Tensor, nn


def is_fp8(output: Tensor, expected: Tensor) -> bool:
    return 0 < (output - expected).norm() / expected.norm() < 0.1


def by_name(model: nn.Module, x: Tensor) -> None:
    """torch.compile finds the backend without anyone importing fp8fx."""
    assert "fp8fx" not in sys.modules
    assert is_fp8(torch.compile(model, backend="fp8")(x), model(x))
    assert "fp8fx" in sys.modules


def by_import(model: nn.Module, x: Tensor) -> None:
    import fp8fx

    assert "site-packages" in Path(fp8fx.__file__).parts
    assert is_fp8(fp8fx.convert(torch.fx.symbolic_trace(model))(x), model(x))
    assert len(fp8fx.explain(model, x).rewritten) == 2


def two_passes() -> None:
    """`passes` is the user's, fp8fx's own go by fp8fx.passes, and the wheel installed nothing but fp8fx."""
    import fp8fx.passes.inductor
    import fp8fx.passes.rewrite
    import passes

    assert passes.OWNER == "the user"
    assert fp8fx.passes.rewrite.PIPELINE
    assert fp8fx.passes.inductor.HOOKS
    files = importlib.metadata.files("fp8fx") or []
    assert {file.parts[0].split("-")[0] for file in files} == {"fp8fx"}, files


if __name__ == "__main__":
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 32)).eval()
    with torch.no_grad():
        by_name(model, torch.randn(8, 64))
        by_import(model, torch.randn(8, 64))
    two_passes()
    print("the installed wheel works")
