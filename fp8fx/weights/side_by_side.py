"""FP8 weights of siblings that lie side by side in memory, so that one GEMM reads them all without a copy.

They are laid so when a graph first reads them together, and stay so. `.to`, a copy or a load gives each weight memory
of its own again; the next call lays them side by side anew.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fp8fx.ops.fp8_weight import FP8Weight

__all__ = ["end_to_end", "lie_with_others", "side_by_side"]

_lock = threading.RLock()


class _Place(NamedTuple):
    """Where a part of a weight lies: in which tensor, as which of how many."""

    whole: Tensor
    at: int
    of: int


def _whole_of(parts: Sequence[Tensor]) -> Tensor | None:
    """The tensor that these are, in this order; None if they lie otherwise."""
    place: _Place | None = getattr(parts[0], "fp8fx_place", None)
    if place is None or place.of != len(parts):
        return None
    whole = place.whole
    for i, part in enumerate(parts):
        place = getattr(part, "fp8fx_place", None)
        if place is None or place.whole is not whole or place.at != i:
            return None
    return whole


def side_by_side(name: str, *weights: FP8Weight) -> Tensor:
    """The `qdata` (N_i, K), or the `scale` (N_i, 1), of the weights as one tensor: no copy, but the memory of each.

    If they do not lie so, they are laid side by side now. Whatever shares memory with a weight sees it there.
    """
    parts = [getattr(weight, name) for weight in weights]
    whole = _whole_of(parts)
    if whole is not None:
        return whole
    with _lock, torch.inference_mode(False), torch.no_grad():
        return _lay(parts)


def end_to_end(parts: Sequence[Tensor]) -> Tensor:
    """A copy of these, one behind the other. As bytes, since not every kernel takes float8, nor does autocast."""
    return torch.cat([part.view(torch.uint8) for part in parts]).view(parts[0].dtype)


def _lay(parts: Sequence[Tensor]) -> Tensor:
    whole = end_to_end(parts)
    start = 0
    for i, part in enumerate(parts):
        size = part.shape[0]
        part.set_(whole.narrow(0, start, size))  # type: ignore[call-overload]
        part.fp8fx_place = _Place(whole, i, len(parts))  # type: ignore[attr-defined]
        start += size
    return whole


def lie_with_others(weights: Sequence[FP8Weight]) -> bool:
    """Whether one of these lies beside others than these, as another graph reads it."""
    parts = [weight.qdata for weight in weights]
    return any(hasattr(part, "fp8fx_place") for part in parts) and _whole_of(parts) is None
