"""The executors, in one table, and which of them runs on a device."""

from __future__ import annotations

import torch

from fp8fx.errors import ExecutorError, unknown
from fp8fx.executors.bitsandbytes import BitsAndBytes
from fp8fx.executors.executor import Executor
from fp8fx.executors.scaled_mm import ScaledMM
from fp8fx.executors.simulated import Simulated

__all__ = ["AUTO", "EXECUTORS", "check_name", "names", "names_that_keep_fp8_weights", "resolve"]

AUTO = "auto"
"""The name that leaves the choice to the device."""


EXECUTORS: dict[str, Executor] = {
    executor.name: executor
    for executor in (
        ScaledMM(),
        BitsAndBytes(),
        Simulated(),
    )
}
"""Every executor by its name, in the order in which `auto` prefers them. The last runs everywhere."""


def names() -> tuple[str, ...]:
    """What the user can name: `auto`, and every executor."""
    return (AUTO, *EXECUTORS)


def names_that_keep_fp8_weights() -> tuple[str, ...]:
    """The executors that can multiply a weight that is FP8 already."""
    return tuple(name for name, executor in EXECUTORS.items() if executor.keeps_fp8_weights)


def check_name(name: str) -> None:
    """Raises ConfigError if `name` is neither `auto` nor an executor's."""
    if name not in names():
        raise unknown("executor", name, names())


def resolve(name: str, device: torch.device, *, groups: bool = False) -> Executor:
    """The executor that runs on `device`: the one of that name, or the one that `auto` means there.

    With `groups`, it multiplies groups there.

    Raises:
        ExecutorError: the executor was asked for by name and cannot do so on the device.
    """
    if name == AUTO:
        executor = _automatic(device, groups)
    else:
        executor = EXECUTORS[name]
        _check_device(executor, device, groups)
    executor.prepare()
    return executor


def _automatic(device: torch.device, groups: bool) -> Executor:
    """The first of the table that suits the device."""
    return next(
        executor
        for executor in EXECUTORS.values()
        if executor.is_automatic(device) and (not groups or executor.groups(device))
    )


def _check_device(executor: Executor, device: torch.device, groups: bool) -> None:
    """Raises ExecutorError if the executor cannot run there, with what can."""
    fallback = Simulated.name
    if (reason := executor.why_unavailable(device)) is not None:
        raise ExecutorError(
            f"executor {executor.name!r} {reason}; "
            f"use executor={fallback!r} for the same values without tensor cores, or {AUTO!r}"
        )
    if groups and (reason := executor.why_no_groups(device)) is not None:
        raise ExecutorError(f"executor {executor.name!r} {reason}; use executor={fallback!r}, or {AUTO!r}")
