"""A cast to FP8 with one scale, and a GEMM of two of them, as Inductor's graphs have them."""

from __future__ import annotations

import torch
from torch import Tensor

aten, prims = torch.ops.aten, torch.ops.prims
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def cast(x: Tensor, scale: Tensor, dtype: torch.dtype = E4M3) -> Tensor:
    """As the ops decompose."""
    inverse = prims.convert_element_type(prims.convert_element_type(scale, torch.float64).reciprocal(), torch.float32)
    cast: Tensor = prims.convert_element_type(prims.convert_element_type(x, torch.float32) * inverse, dtype)
    return cast


def scaled_mm(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    out: Tensor = aten._scaled_mm(a, b, scale, scale, out_dtype=torch.float32)
    return out
