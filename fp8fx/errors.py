"""Typed errors. Each says what was given, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BlockSizeError",
    "ConfigError",
    "DTypeError",
    "DeviceError",
    "DifferentiationError",
    "ExecutorError",
    "FP8Error",
    "FP8Warning",
    "FreezeError",
    "GraphError",
    "ShapeError",
    "unknown",
]


class FP8Error(Exception):
    """Base class of every error that fp8fx raises.

    >>> import fp8fx
    >>> try:
    ...     fp8fx.Config(recipe="mixd")
    ... except fp8fx.FP8Error as error:
    ...     print(error)
    unknown recipe 'mixd'; expected one of global, mixed, rowwise. Did you mean 'mixed'?
    """


class ConfigError(FP8Error, ValueError):
    """An option has an unknown name, or a value outside the valid ones."""


class BlockSizeError(FP8Error, ValueError):
    """`bsz` or `bsz2` is outside the ladder of block sizes."""


class ShapeError(FP8Error, ValueError):
    """Operand shapes do not multiply."""


class DTypeError(FP8Error, TypeError):
    """An operand has a dtype that cannot be quantized to FP8."""


class DeviceError(FP8Error, ValueError):
    """Operands live on different devices."""


class ExecutorError(FP8Error, RuntimeError):
    """The executor asked for cannot run on this device."""


class DifferentiationError(FP8Error, RuntimeError):
    """A gradient of an FP8 op was differentiated again."""


class GraphError(FP8Error, TypeError):
    """The model or its example inputs are not something `convert` can read."""


class FreezeError(FP8Error, RuntimeError):
    """A weight cannot be frozen, or a frozen one is used as if it were not."""


class FP8Warning(UserWarning):
    """No result is wrong, but less was gained than could be: no linear was rewritten, or a pass was left out.

    To have an error instead:

    >>> import warnings
    >>> import fp8fx
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("error", fp8fx.FP8Warning)
    """


def unknown(what: str, given: object, valid: Iterable[str]) -> ConfigError:
    """The error for a name outside `valid`, with the nearest valid one."""
    names = sorted(valid)
    close = difflib.get_close_matches(str(given), names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return ConfigError(f"unknown {what} {given!r}; expected one of {', '.join(names)}.{hint}")
