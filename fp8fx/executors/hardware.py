"""What a device can do, and which executor `auto` means there."""

from __future__ import annotations

import functools

import torch

from fp8fx.errors import ExecutorError

__all__ = ["has_fp8_tensor_cores", "resolve", "resolve_grouped"]

_FP8_CAPABILITY = (8, 9)  # Ada and Hopper on


_GROUPED_CAPABILITY = (9, 0)  # torch's grouped GEMM with a scale a row is Hopper's alone


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _nvidia_capability(device: torch.device) -> tuple[int, int] | None:
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return None
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


def has_fp8_tensor_cores(device: torch.device) -> bool:
    """Whether `torch._scaled_mm` runs on tensor cores there: NVIDIA, compute capability >= 8.9."""
    capability = _nvidia_capability(device)
    return capability is not None and capability >= _FP8_CAPABILITY


def _ready(executor: str) -> str:
    if executor == "bitsandbytes":
        import bitsandbytes  # noqa: F401 - a graph from Inductor's cache on disk calls its operators, and nothing else imports it
    return executor


def resolve(executor: str, device: torch.device) -> str:
    """The executor that runs on `device`: `executor` itself, or what `auto` means.

    Raises:
        ExecutorError: `scaled_mm` was asked for by name and the device has no FP8 tensor cores.
    """
    if executor == "auto":
        if has_fp8_tensor_cores(device):
            return "scaled_mm"
        # Triton cannot convert E4M3 below 8.9; bitsandbytes' own kernels can.
        return _ready("bitsandbytes" if device.type == "cuda" and torch.version.hip is None else "simulated")
    if executor == "scaled_mm" and not has_fp8_tensor_cores(device):
        capability = _nvidia_capability(device)
        found = f"device {device}" if capability is None else f"compute capability {'.'.join(map(str, capability))}"
        raise ExecutorError(
            f"executor 'scaled_mm' needs a CUDA device of compute capability 8.9 or higher, found {found}; "
            "use executor='simulated' for the same values without tensor cores, or 'auto'"
        )
    return _ready(executor)


def resolve_grouped(executor: str, device: torch.device) -> str:
    """As `resolve`, for grouped GEMMs: where tensor cores do not multiply groups in FP8 `auto` simulates.

    Raises:
        ExecutorError: `scaled_mm` was asked for by name and the device is not of compute capability 9.0.
    """
    found, capability = resolve(executor, device), _nvidia_capability(device)
    if found != "scaled_mm" or capability == _GROUPED_CAPABILITY:
        return found
    if executor == "auto":
        return "simulated"
    raise ExecutorError(
        f"executor 'scaled_mm' multiplies groups on compute capability 9.0 alone, found {capability}; use executor='simulated', or 'auto'"
    )
