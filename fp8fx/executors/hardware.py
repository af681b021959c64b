"""What a device can do."""

from __future__ import annotations

import functools

import torch

__all__ = ["has_fp8_tensor_cores", "is_nvidia", "nvidia_capability"]

_FP8_CAPABILITY = (8, 9)  # Ada and Hopper on


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def is_nvidia(device: torch.device) -> bool:
    """Whether it is a CUDA device, and torch is built for NVIDIA's."""
    return device.type == "cuda" and torch.version.hip is None


def nvidia_capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of an NVIDIA device, such as (9, 0); None for any other, and if CUDA does not run."""
    if not is_nvidia(device) or not torch.cuda.is_available():
        return None
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


def has_fp8_tensor_cores(device: torch.device) -> bool:
    """Whether `torch._scaled_mm` runs on tensor cores there: NVIDIA, compute capability >= 8.9."""
    capability = nvidia_capability(device)
    return capability is not None and capability >= _FP8_CAPABILITY
