"""Seconds of a GEMM on a device: measured once, then remembered.

If nothing can be measured (too little memory, a stream that is capturing, any error) the figure is None.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8fx.errors import unknown
from fp8fx.executors import weight_only
from fp8fx.executors.scaled_mm import ALIGNMENT, scales_after
from fp8fx.profit.remembered import figure
from fp8fx.recipes.quantize import Quantized
from fp8fx.torch_internals import disable_current_modes, occupy, scaled_mm

__all__ = ["KINDS", "bandwidth", "seconds"]

KINDS = ("high", "tensor", "row", "weight_only")
"""How a GEMM is computed.

It is in high precision, in FP8 with a scale per tensor or per row, or one row as it is times an FP8 weight.
"""


_COPIED_BYTES = 256 << 20  # several times any L2


_WEIGHT_BYTES = 64 << 20  # of all copies of a weight, read in turn: more than an L2 of 50 MB keeps


_MAX_COPIES = 64  # for tiny weights


_PART_BYTES = 256 << 20  # of a larger weight, such as a head's, only some rows are measured


_MAX_MEMORY_SHARE = 1 / 16  # of the free memory


_BATCH_SECONDS = 2e-4  # that a batch takes at least


_BATCHES = 5


# The device waits in front of a batch while the host enqueues it. In cycles of about half a nanosecond: at first long
# enough for the device's clock to rise, then as long as the host needs, and at most.
_WAKE_CYCLES = 1 << 24
_AHEAD_CYCLES = 1 << 20
_MAX_AHEAD_CYCLES = 1 << 28


def _batch(calls: Sequence[Callable[[], object]], ahead: int) -> tuple[float, bool]:
    """Seconds that the device takes for all the calls, and whether it had them all before it began.

    If it had not, it waited for the host.
    """
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    occupy(ahead)
    start.record()
    for call in calls:
        call()
    ready = not start.query()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3, ready


def _time(calls: Sequence[Callable[[], object]]) -> float:
    """Seconds of a call on the current device, of calls that follow each other in turn.

    It is the least of several batches, since others use the device too.
    """
    turn = itertools.cycle(calls)
    next(turn)()  # compiles, loads and tunes what it has to
    seconds_of_one, _ = _batch([next(turn)], _WAKE_CYCLES)
    repeats = math.ceil(2 * _BATCH_SECONDS / seconds_of_one)  # twice, since a single call is measured too long
    ahead = _AHEAD_CYCLES
    seconds = list[float]()
    while len(seconds) < _BATCHES:
        spent, ready = _batch([next(turn) for _ in range(repeats)], ahead)
        if ready:
            seconds.append(spent / repeats)
            continue
        ahead *= 4
        if ahead > _MAX_AHEAD_CYCLES:
            raise RuntimeError("the host cannot keep the device busy")
    return min(seconds)


def _check_memory(device: torch.device, needed: int) -> None:
    """Raises MemoryError unless sixteen times the bytes that are needed are free, the allocator's reserve included."""
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if needed > free * _MAX_MEMORY_SHARE:
        raise MemoryError(f"{needed} bytes are needed, and {free} are free")


def _copy_rate(device: torch.device) -> float:
    _check_memory(device, 2 * _COPIED_BYTES)
    source = torch.arange(_COPIED_BYTES // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    return 2 * _COPIED_BYTES / _time([lambda: target.copy_(source)])


def _calls(
    device: torch.device, kind: str, m: int, k: int, n: int, dtype: torch.dtype, fast: bool, copies: int
) -> list[Callable[[], Tensor]]:
    """The GEMM on each of several copies of its weight."""
    generator = torch.Generator(device).manual_seed(0)  # its own: the user's random numbers stay what they are
    unit_scale = torch.ones((), device=device)

    def random(rows: int, columns: int, fp8: bool) -> Tensor:  # zeros take less power and run faster
        x = torch.randn(rows, columns, dtype=dtype, device=device, generator=generator)
        return x.to(torch.float8_e4m3fn) if fp8 else x

    a = random(m, k, kind in ("tensor", "row"))
    weight = random(n, k, kind != "high")
    scale_a = scale_b = unit_scale
    out = dtype
    # So small a product gains nothing anyway if the weight is not frozen.
    if kind == "row" and scales_after(m, n, never_recomputed=True):
        out = torch.float32  # the scales are multiplied to it, in a kernel that joins the next
    elif kind == "row":
        scale_a = unit_scale.expand(m, 1).contiguous()
        scale_b = unit_scale.expand(1, n).contiguous()

    def gemm(b: Tensor) -> Tensor:
        if kind == "high":
            return F.linear(a, b)
        if kind == "weight_only":
            return weight_only.matmul(a, Quantized(b, unit_scale))
        return scaled_mm(a, b.t(), scale_a, scale_b, out_dtype=out, use_fast_accum=fast)

    return [functools.partial(gemm, b) for b in (weight, *(weight.clone() for _ in range(copies - 1)))]


def _gemm(device: torch.device, kind: str, m: int, k: int, n: int, dtype: torch.dtype, fast: bool) -> float:
    parts = math.ceil(k * n * dtype.itemsize / _PART_BYTES)  # equal for each kind, since they are compared
    rows = math.ceil(n / parts)
    rows += -rows % ALIGNMENT if parts > 1 else 0
    weight_bytes = k * rows * (dtype.itemsize if kind == "high" else 1)
    copies = min(max(math.ceil(_WEIGHT_BYTES / weight_bytes), 1 if parts > 1 else 2), _MAX_COPIES)
    _check_memory(device, copies * weight_bytes + (m * k + k * rows + m * rows) * dtype.itemsize)
    return _time(_calls(device, kind, m, k, rows, dtype, fast, copies)) * n / rows


@contextlib.contextmanager
def _aside(device: torch.device) -> Iterator[None]:
    """Runs kernels on that device and nothing else: without modes that trace or fake, without autograd and autocast."""
    with disable_current_modes(), torch.cuda.device(device), torch.no_grad(), torch.autocast("cuda", enabled=False):
        yield


def _measured(measure: Callable[[], float], device: torch.device) -> float | None:
    """What `measure` gives; None while a stream is capturing, when nothing can be measured."""
    with _aside(device):
        return None if torch.cuda.is_current_stream_capturing() else measure()


def seconds(
    device: torch.device, kind: str, m: int, k: int, n: int, dtype: torch.dtype, *, exact: bool = False
) -> float | None:
    """Seconds of `a (M, K) @ b.T`, b (N, K), its operands at hand and b not in the L2; None if it cannot be measured.

    Args:
        device: a CUDA device.
        kind: one of KINDS.
        m, k, n: the sizes; FP8 operands are padded to the next multiples of 16 of K and N, as when they are used.
        dtype: the output's, and that of operands in high precision.
        exact: FP8 without fast accumulation, as wgrad; otherwise with it for bfloat16, for which the ops use it.

    Raises:
        ConfigError: an unknown kind.
    """
    if kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    if min(m, k, n) < 1 or (kind == "weight_only" and m > weight_only.ROWS):
        return None
    options = []
    fast = kind in ("tensor", "row") and dtype == torch.bfloat16 and not exact
    if kind in ("tensor", "row"):
        k, n = (size + -size % ALIGNMENT for size in (k, n))
        options += ["fast"] if fast else []
    elif kind == "high" and dtype == torch.float32:
        options += ["tf32"] if torch.backends.cuda.matmul.fp32_precision == "tf32" else []
    key = " ".join((kind, f"{m}x{k}x{n}", str(dtype).removeprefix("torch."), *options))
    return figure(device, key, lambda indexed: _measured(lambda: _gemm(indexed, kind, m, k, n, dtype, fast), indexed))


def bandwidth(device: torch.device) -> float | None:
    """Bytes a second that a large copy on the device reads and writes, together; None if it cannot be measured."""
    return figure(device, "bandwidth", lambda indexed: _measured(lambda: _copy_rate(indexed), indexed))
