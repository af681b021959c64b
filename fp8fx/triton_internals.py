"""Triton's private API that fp8fx uses: which assembler turns its kernels into machine code. No public one tells."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Assembler", "ptxas"]


def _version(text: str) -> tuple[int, ...]:
    """Of `3.8.0` or `3.8.0+git1234` the numbers."""
    return tuple(int(part) for part in text.partition("+")[0].split(".") if part.isdigit())


class Assembler(NamedTuple):
    """The `ptxas` that turns Triton's PTX into machine code: of which Triton, where, and of which release of CUDA."""

    triton: tuple[int, ...]
    path: str
    release: tuple[int, ...]


def ptxas(capability: tuple[int, int]) -> Assembler | None:
    """The one that Triton uses for devices of this compute capability; None if there is none. It is no part of Triton's
    public API."""
    try:
        import triton
        from triton.backends.nvidia.compiler import get_ptxas

        tool = get_ptxas(10 * capability[0] + capability[1])
    except (AttributeError, ImportError, RuntimeError):  # no Triton, one for other devices, or one without the tool
        return None
    return Assembler(_version(triton.__version__), tool.path, _version(tool.version))
