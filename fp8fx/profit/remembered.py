"""Figures of a device: measured once, then kept in the process and in a small file.

The file belongs to one device model and one set of versions. It lies in `$FP8FX_CACHE_DIR`, otherwise in
`$XDG_CACHE_HOME/fp8fx`, otherwise in `~/.cache/fp8fx`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import logging
import math
import os
import re
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

import torch

__all__ = ["figure"]

log = logging.getLogger("fp8fx")


_SCHEMA = 2  # counts up when the same key comes to mean another measurement


_lock = threading.Lock()


_figures: dict[tuple[str, ...], dict[str, float | None]] = {}
"""By file and identity. None is for what could not be measured, which no file says."""


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
    """The device's file; None if there is no place for one."""
    own = os.environ.get("FP8FX_CACHE_DIR")
    shared = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(own) if own else (Path(shared) if shared else Path.home() / ".cache") / "fp8fx"
    except RuntimeError:  # a user without a home
        return None
    name = re.sub(r"[^\w.+-]", "_", "-".join((*_identity(device), f"v{_SCHEMA}")))
    return folder / f"{name}.json"


def _read(path: Path | None) -> dict[str, float]:
    """The figures of the file; none if it cannot be read, and nothing that is no figure."""
    try:
        content = {} if path is None else json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    entries = content.items() if isinstance(content, dict) else ()
    return {key: x for key, x in entries if isinstance(x, float) and 0 < x < math.inf}


def _write(path: Path | None, entries: dict[str, float]) -> None:
    """Adds to the file, at once or not at all.

    Of two processes that add at the same moment one may lose, and will measure again.
    """
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


def figure(device: torch.device, key: str, measure: Callable[[torch.device], float | None]) -> float | None:
    """The figure of that key for the device: from this process, from the file, or measured now.

    Args:
        device: a CUDA device.
        key: what is measured; see `measure.seconds`.
        measure: measures it on the device that it is given, whose index is known; None if it cannot this time only.

    Returns:
        None if it cannot be measured.
    """
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    with _lock:
        path = _file(device)
        figures = _figures.setdefault((str(path), *_identity(device)), {})
        if key not in figures:
            figures |= {**_read(path), **figures}
        if key not in figures:
            try:
                measured = measure(device)
            except Exception as error:  # too little memory, or anything else: whoever asks has an estimate
                log.debug("cannot measure %s on %s: %r", key, device, error)
                figures[key] = None
                return None
            if measured is None:
                return None
            log.debug("measured %s on %s: %g", key, device, measured)
            figures[key] = measured
            _write(path, {key: measured})
        return figures[key]
