"""Where the times of a device come from: measured there, or predicted by the model if nothing can be measured."""

from __future__ import annotations

import torch

from fp8fx.profit import measure
from fp8fx.profit.cost_model import MODEL, Linear, Times

__all__ = ["times_on"]


def _sizes(linear: Linear, gemm: str) -> tuple[int, int, int]:
    """Rows, contracted dimension and columns of one of a linear's GEMMs.

    wgrad gives the weight in its own layout, (N, K).
    """
    m, k, n = linear.m, linear.k, linear.n
    return {"forward": (m, k, n), "dgrad": (m, n, k), "wgrad": (n, m, k)}[gemm]


def times_on(device: torch.device) -> Times:
    """Measured on the device; the model's if there is none."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return MODEL

    def seconds(linear: Linear, gemm: str, kind: str) -> float | None:
        return measure.seconds(device, kind, *_sizes(linear, gemm), linear.dtype, exact=gemm == "wgrad")

    return Times(seconds, measure.bandwidth(device) or MODEL.bandwidth)
