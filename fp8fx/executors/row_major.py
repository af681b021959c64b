"""An FP8 operand as rows that lie densely, as the GEMMs read it; a copy if it lies otherwise.

Inductor makes that copy in the kernel that casts, which then stores FP8 values in two layouts. Triton 3.8.0 with the
`ptxas` that it brings gets 45 of 132 such kernels wrong, in silence. With a `ptxas` of CUDA 13 it gets none wrong
(triton-lang/triton#11111, docs/numerics.md). Unless the `ptxas` that Triton uses was seen to be right, an operator that
Inductor does not see into makes the copy.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from fp8fx.errors import FP8Warning
from fp8fx.triton_internals import ptxas

__all__ = ["row_major", "verdicts"]

# Seen to be right: Triton 3.6 with any `ptxas`, and a `ptxas` of CUDA 13 or newer with any Triton. Others are not
# trusted.
_RIGHT_TRITON = (3, 6)
_RIGHT_PTXAS = (13, 0)


@functools.cache
def _is_miscompiled(index: int) -> bool:
    """Whether the `ptxas` that Triton uses for a CUDA device writes FP8 values wrong; says once what to do."""
    assembler = ptxas(torch.cuda.get_device_capability(index))
    if assembler is None or assembler.triton[:2] <= _RIGHT_TRITON or assembler.release >= _RIGHT_PTXAS:
        return False
    triton = ".".join(map(str, assembler.triton))
    release = ".".join(map(str, assembler.release))
    warnings.warn(
        f"fp8: Triton {triton} uses {assembler.path} of CUDA {release}, which writes FP8 values in two layouts wrong "
        "(triton-lang/triton#11111). Such operands are copied by a kernel of their own, which takes longer; "
        "set TRITON_PTXAS_PATH to a ptxas of CUDA 13 or newer before the program starts",
        FP8Warning,
        stacklevel=2,
    )
    return True


@torch.library.custom_op("fp8fx::row_major", mutates_args=())
def _copied(x: Tensor) -> Tensor:
    """The values of `x`, FP8 of any layout, contiguous."""
    return x.view(torch.uint8).clone(memory_format=torch.contiguous_format).view(x.dtype)  # not every kernel takes FP8


@_copied.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def verdicts() -> tuple[bool, ...]:
    """Of each CUDA device whether such operands are copied apart: part of the compile caches' keys."""
    if not torch.cuda.is_available() or torch.version.hip:
        return ()
    return tuple(map(_is_miscompiled, range(torch.cuda.device_count())))


def _wants_own_kernel(device: torch.device) -> bool:
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip:
        return False
    return _is_miscompiled(torch.cuda.current_device() if device.index is None else device.index)


def row_major(x: Tensor) -> Tensor:
    """`x`, or a contiguous copy if it lies otherwise."""
    own_kernel = _wants_own_kernel(x.device) and not x.is_contiguous()
    laid_out: Tensor = _copied(x) if own_kernel else x.contiguous()
    return laid_out
