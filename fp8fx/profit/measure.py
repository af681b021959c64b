"""Seconds of a GEMM on a device: measured once, then read from a small file.

The file belongs to one device model and one set of versions, and lies in `$FP8FX_CACHE_DIR`, else `$XDG_CACHE_HOME/fp8fx`, else
`~/.cache/fp8fx`. Where nothing can be measured (too little memory, a stream that is capturing, any error) the figure is None.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import itertools
import json
import logging
import math
import os
import re
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8fx.errors import unknown
from fp8fx.executors import weight_only
from fp8fx.executors.scaled_mm import ALIGNMENT, scales_after
from fp8fx.recipes.quantize import Quantized
from fp8fx.torch_internals import disable_current_modes, occupy, scaled_mm

__all__ = ["KINDS", "bandwidth", "seconds"]

log = logging.getLogger("fp8fx")


KINDS = ("high", "tensor", "row", "weight_only")
"""How a GEMM is computed: in high precision; in FP8 with a scale per tensor, or per row; one row as it is times an FP8 weight."""


_SCHEMA = 2  # counts up when the same key comes to mean another measurement


_COPIED = 256 << 20  # bytes, several times any L2


_WEIGHTS = 64 << 20  # bytes of copies of a weight, read in turn: more than an L2 of 50 MB keeps


_COPIES = 64  # the most, for tiny weights


_MEMORY = 1 / 16  # the most of the free memory


_BATCH = 2e-4  # seconds that a batch takes at least


_BATCHES = 5


# Cycles, of about half a nanosecond, that the device waits in front of a batch while the host enqueues it: at first long enough for its
# clock to rise, then what the host needs.
_WAKE, _AHEAD, _LONGEST = 1 << 24, 1 << 20, 1 << 28


def _batch(calls: Sequence[Callable[[], object]], ahead: int) -> tuple[float, bool]:
    """Seconds that the device takes for all the calls, and whether it had them all before it began: else it waited for the host."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    occupy(ahead)
    start.record()
    for call in calls:
        call()
    ready = not start.query()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3, ready


def _time(calls: Sequence[Callable[[], object]]) -> float:
    """Seconds of a call on the current device, that follow each other in turn: the least of batches, since others use it too."""
    turn = itertools.cycle(calls)
    next(turn)()  # compiles, loads and tunes what it has to
    one, _ = _batch([next(turn)], _WAKE)
    repeats = math.ceil(2 * _BATCH / one)  # twice, since a single call is measured too long
    ahead, found = _AHEAD, list[float]()
    while len(found) < _BATCHES:
        spent, ready = _batch([next(turn) for _ in range(repeats)], ahead)
        if ready:
            found.append(spent / repeats)
        elif (ahead := 4 * ahead) > _LONGEST:
            raise RuntimeError("the host cannot keep the device busy")
    return min(found)


def _check_memory(device: torch.device, needed: int) -> None:
    """Raises MemoryError where the device has not sixteen times the bytes that are needed, the allocator's own reserve included."""
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if needed > free * _MEMORY:
        raise MemoryError(f"{needed} bytes are needed, and {free} are free")


def _copy_rate(device: torch.device) -> float:
    _check_memory(device, 2 * _COPIED)
    source = torch.arange(_COPIED // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    return 2 * _COPIED / _time([lambda: target.copy_(source)])


def _calls(
    device: torch.device, kind: str, m: int, k: int, n: int, dtype: torch.dtype, fast: bool, copies: int
) -> list[Callable[[], Tensor]]:
    """The GEMM on each of several copies of its weight."""
    generator = torch.Generator(device).manual_seed(0)  # its own: the user's random numbers stay what they are
    one = torch.ones((), device=device)

    def random(rows: int, columns: int, fp8: bool) -> Tensor:  # zeros take less power and run faster
        x = torch.randn(rows, columns, dtype=dtype, device=device, generator=generator)
        return x.to(torch.float8_e4m3fn) if fp8 else x

    a, first = random(m, k, kind in ("tensor", "row")), random(n, k, kind != "high")
    scale_a, scale_b, out = one, one, dtype
    if kind == "row" and scales_after(
        m, n, never_recomputed=True
    ):  # so small a product gains nothing anyway where the weight is not frozen
        out = torch.float32  # what the scales are multiplied to, in a kernel that joins the next
    elif kind == "row":
        scale_a, scale_b = one.expand(m, 1).contiguous(), one.expand(1, n).contiguous()

    def gemm(weight: Tensor) -> Tensor:
        if kind == "high":
            return F.linear(a, weight)
        if kind == "weight_only":
            return weight_only.matmul(a, Quantized(weight, one))
        return scaled_mm(a, weight.t(), scale_a, scale_b, out_dtype=out, use_fast_accum=fast)

    return [functools.partial(gemm, weight) for weight in (first, *(first.clone() for _ in range(copies - 1)))]


def _gemm(device: torch.device, kind: str, m: int, k: int, n: int, dtype: torch.dtype, fast: bool) -> float:
    weight = k * n * (dtype.itemsize if kind == "high" else 1)
    copies = min(max(math.ceil(_WEIGHTS / weight), 2), _COPIES)
    _check_memory(device, copies * weight + (m * k + k * n + m * n) * dtype.itemsize)
    return _time(_calls(device, kind, m, k, n, dtype, fast, copies))


@contextlib.contextmanager
def _aside(device: torch.device) -> Iterator[None]:
    """Runs kernels on that device and nothing else: without modes that trace or fake, without autograd and autocast."""
    with disable_current_modes(), torch.cuda.device(device), torch.no_grad(), torch.autocast("cuda", enabled=False):
        yield


_lock = threading.Lock()


_known: dict[
    tuple[str, ...], dict[str, float | None]
] = {}  # by file and identity; None for what could not be measured, which no file says


@functools.cache
def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "source"


def _identity(device: torch.device) -> tuple[str, ...]:
    """What a figure depends on besides its key."""
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    versions = (
        f"torch{torch.__version__}",
        f"cuda{torch.version.cuda}",
        *(f"{name}{_version(name)}" for name in ("triton", "fp8fx")),
    )
    return torch.cuda.get_device_name(device), capability, *versions


def _file(device: torch.device) -> Path | None:
    """The device's file; None where there is no place for one."""
    own, shared = os.environ.get("FP8FX_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(own) if own else (Path(shared) if shared else Path.home() / ".cache") / "fp8fx"
    except RuntimeError:  # a user without a home
        return None
    name = re.sub(r"[^\w.+-]", "_", "-".join((*_identity(device), f"v{_SCHEMA}")))
    return folder / f"{name}.json"


def _read(path: Path | None) -> dict[str, float]:
    """What the file holds; nothing where it cannot be read, and nothing that is no figure."""
    try:
        held = {} if path is None else json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    entries = held.items() if isinstance(held, dict) else ()
    return {key: x for key, x in entries if isinstance(x, float) and 0 < x < math.inf}


def _write(path: Path | None, entries: dict[str, float]) -> None:
    """Adds to the file, at once or not at all. Of two processes that add at the same moment one may lose, and will measure again."""
    if path is None:
        return
    temporary = path.with_name(f"{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({**_read(path), **entries}, indent=0, sort_keys=True))
        os.replace(temporary, path)
    except OSError as error:
        log.debug("the measured times are not kept: %s", error)
        with contextlib.suppress(OSError):
            temporary.unlink()


def _remembered(device: torch.device, key: str, measure: Callable[[torch.device], float]) -> float | None:
    """The figure of that key for the device: from this process, from the file, or measured now."""
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    with _lock:
        path = _file(device)
        known = _known.setdefault((str(path), *_identity(device)), {})
        if key not in known:
            known |= {**_read(path), **known}
        if key not in known:
            try:
                with _aside(device):
                    if torch.cuda.is_current_stream_capturing():
                        return None  # this time only
                    known[key] = figure = measure(device)
            except Exception as error:  # too little memory, or anything else: whoever asks has an estimate
                log.debug("cannot measure %s on %s: %r", key, device, error)
                known[key] = None
            else:
                log.debug("measured %s on %s: %g", key, device, figure)
                _write(path, {key: figure})
        return known[key]


def seconds(
    device: torch.device, kind: str, m: int, k: int, n: int, dtype: torch.dtype, *, exact: bool = False
) -> float | None:
    """Seconds of `a (M, K) @ b.T`, b (N, K), its operands at hand and b not in the L2; None where it cannot be measured.

    Args:
        device: a CUDA device.
        kind: one of KINDS.
        m, k, n: the sizes; FP8 operands are padded to the next multiples of 16 of K and N, as when they are used.
        dtype: the output's, and that of operands in high precision.
        exact: FP8 without fast accumulation, as wgrad; else with it where the ops use it, for bfloat16.

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
    return _remembered(device, key, lambda where: _gemm(where, kind, m, k, n, dtype, fast))


def bandwidth(device: torch.device) -> float | None:
    """Bytes a second that a large copy on the device reads and writes, together; None where it cannot be measured."""
    return _remembered(device, "bandwidth", _copy_rate)
