"""bitsandbytes' own semantics: its code tables, its blockwise kernels, its blocks cut from the flattened tensor.

Slow, and the only executor whose blocks may straddle two rows; it is there for older CUDA devices and as a reference.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fp8fx.executors import simulated
from fp8fx.recipes.formats import E4M3, Format
from fp8fx.recipes.quantize import Quantized
from fp8fx.recipes.recipe import Cast
from fp8fx.torch_internals import disable_current_modes

__all__ = ["grouped_matmul", "matmul", "quantize"]

matmul, grouped_matmul = simulated.matmul, simulated.grouped_matmul


@functools.cache
def _functional() -> Any:
    import bitsandbytes.functional  # here, not above: on a CPU machine its import prints about missing kernels

    return bitsandbytes.functional


@functools.cache
def _values(fmt: Format) -> tuple[float, ...]:
    exponent, mantissa = (4, 3) if fmt.dtype == E4M3.dtype else (5, 2)
    with disable_current_modes():  # the first call may be one that is traced
        values: list[float] = _functional().create_fp8_map(True, exponent, mantissa, 8).tolist()
    return tuple(values)


def quantize(x: Tensor, cast: Cast, block: int, scale: Tensor | None = None) -> Quantized:
    """Quantizes and dequantizes `x` (rows, features): the result's `data` holds values of x's dtype, its `scale` is None."""
    assert scale is None
    code = torch.tensor(_values(cast.format), device=x.device)
    if cast.granularity == "block":
        codes, state = _functional().quantize_blockwise(x.contiguous(), code=code, blocksize=block)
        value = _functional().dequantize_blockwise(codes, state, blocksize=block)
    else:
        # What its `quantize` did before 0.50 removed it: the nearest entry of the code table to x / amax.
        amax = (x.abs().amax(-1, keepdim=True) if cast.granularity == "row" else x.abs().amax()).float()
        value = code[torch.bucketize((x.float() / amax).contiguous(), (code[1:] + code[:-1]) / 2)] * amax
    # Its tables have no NaN: it would return a number.
    return Quantized(torch.where(x.isfinite(), value.to(x.dtype), torch.nan), None)
