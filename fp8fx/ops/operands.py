"""What the ops do with their operands before they multiply: dtypes, and autocast."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["DTYPES", "autocast", "may_accumulate_fast"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes that are quantized."""


def may_accumulate_fast(dtype: torch.dtype) -> bool:
    """Whether forward and dgrad may use fast accumulation.

    It errs by 1.4e-3, which is below bfloat16's rounding and above that of the others.

    wgrad never may. Its sums run over all rows of a batch, without a weight's changing signs. If they grow instead of
    cancelling, fast accumulation loses 4 % over 16,384 rows and 18 % over 65,536 (docs/numerics.md).
    """
    return dtype == torch.bfloat16


def autocast(x: Any) -> Any:
    """What autocast does to an operand of a linear: any float but float64 becomes its dtype. None stays None."""
    if x is None or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    device = x.device.type
    if not torch.amp.is_autocast_available(device):  # a meta tensor knows no autocast
        return x
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
