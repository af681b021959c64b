"""bitsandbytes' own semantics: its code tables, its blockwise kernels, its blocks cut from the flattened tensor.

Slow, and the only executor whose blocks may straddle two rows; it is there for older CUDA devices and as a reference.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fp8fx.executors import hardware
from fp8fx.executors.simulated import Simulated
from fp8fx.recipes.formats import E4M3, Format
from fp8fx.recipes.quantize import Quantized
from fp8fx.recipes.recipe import Cast
from fp8fx.torch_internals import disable_current_modes

__all__ = ["BitsAndBytes"]


@functools.cache
def _functional() -> Any:
    import bitsandbytes.functional  # here, not above: on a CPU machine its import prints about missing kernels

    return bitsandbytes.functional


@functools.cache
def _values(fmt: Format) -> tuple[float, ...]:
    """The format's code table, normalized to 1."""
    exponent, mantissa = (4, 3) if fmt.dtype == E4M3.dtype else (5, 2)
    with disable_current_modes():  # the first call may be one that is traced
        values: list[float] = _functional().create_fp8_map(True, exponent, mantissa, 8).tolist()
    return tuple(values)


class BitsAndBytes(Simulated):
    """Quantizes with bitsandbytes' kernels; its products are the simulated ones."""

    name = "bitsandbytes"
    tensor_cores = False
    keeps_fp8_weights = False
    distributions = ("bitsandbytes",)

    def is_automatic(self, device: torch.device) -> bool:
        """On NVIDIA's older devices: Triton cannot convert E4M3 below 8.9; bitsandbytes' own kernels can."""
        return hardware.is_nvidia(device) and not hardware.has_fp8_tensor_cores(device)

    def prepare(self) -> None:
        """Imports bitsandbytes: a graph from Inductor's cache on disk calls its operators; nothing else imports it."""
        import bitsandbytes  # noqa: F401

    def quantize(self, x: Tensor, cast: Cast, block: int, scale: Tensor | None = None) -> Quantized:
        """Quantizes and dequantizes `x` (rows, features): values of x's dtype, and no scale."""
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
