"""What the ops share of their operands: dtypes, autocast, checks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fp8fx.errors import ConfigError, DeviceError, DTypeError, ExecutorError, ShapeError
from fp8fx.executors import registry
from fp8fx.executors.executor import Executor
from fp8fx.recipes.recipe import Recipe

__all__ = ["DTYPES", "autocast", "check_frozen", "check_keeps_fp8_weights", "check_operands", "may_accumulate_fast"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes that are quantized."""


def may_accumulate_fast(dtype: torch.dtype) -> bool:
    """Whether forward and dgrad may use fast accumulation: it errs by 1.4e-3, below bfloat16's rounding and above that of the others.

    wgrad never does. Its sums run over all rows of a batch, without a weight's changing signs: where they grow instead of
    cancelling, fast accumulation loses 4 % over 16,384 rows and 18 % over 65,536 (docs/numerics.md).
    """
    return dtype == torch.bfloat16


def autocast(x: Any) -> Any:
    """What autocast does to an operand of a linear: any float but float64 becomes its dtype."""
    if x is None or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    kind = x.device.type
    enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(
        kind
    )  # a meta tensor knows no autocast
    return x.to(torch.get_autocast_dtype(kind)) if enabled else x


def check_frozen(name: str, b: Tensor, b_scale: Tensor | None, recipe: Recipe, weight_only: bool) -> None:
    """A weight that is FP8 already, with its scale, and the forward GEMM to use it in."""
    if b_scale is None:
        if weight_only:
            raise ConfigError(f"{name} got weight_only=True and no b_scale; it is for a weight that is FP8 already")
        return
    if recipe.forward is None:
        raise ConfigError(f"{name} got a b_scale and a forward in high precision; leave b_scale out, or forward=True")
    cast, n = recipe.forward.rhs, b.shape[1]
    expected: list[tuple[int, ...]] = [()] if cast.granularity == "tensor" else []
    expected += [] if recipe.forward.lhs.granularity == cast.granularity == "tensor" else [(n, 1)]
    if b.dtype != cast.format.dtype:
        raise DTypeError(
            f"{name} got b of {b.dtype} with a b_scale; expected b as {cast.format.dtype}, as the recipe quantizes it"
        )
    if b_scale.dtype != torch.float32:
        raise DTypeError(f"{name} got b_scale of {b_scale.dtype}; expected torch.float32")
    if tuple(b_scale.shape) not in expected:
        raise ShapeError(
            f"{name} got b_scale {tuple(b_scale.shape)}; expected {' or '.join(map(str, expected))} for b {tuple(b.shape)}"
        )
    if b_scale.device != b.device:
        raise DeviceError(f"{name} got b on {b.device} and b_scale on {b_scale.device}; move one with .to")


def check_keeps_fp8_weights(name: str, executor: Executor) -> None:
    """Raises ExecutorError if the op of that name got a `b_scale` and the executor keeps no FP8 weights."""
    if not executor.keeps_fp8_weights:
        others = " or ".join(map(repr, registry.names_that_keep_fp8_weights()))
        raise ExecutorError(f"{name} got a b_scale; executor {executor.name!r} keeps no FP8 weights (use {others})")


def check_operands(name: str, a: Tensor, b: Tensor, bias: Tensor | None, frozen: bool) -> None:
    shapes = f"a {tuple(a.shape)}, b {tuple(b.shape)}"
    if b.dim() != 2 or a.dim() < 1:
        raise ShapeError(f"{name} got {shapes}; expected a of at least one dimension and b of two, (*, K) and (K, N)")
    if a.shape[-1] != b.shape[0]:
        inner = f"a's last dimension {a.shape[-1]} and b's first {b.shape[0]} must be equal"
        raise ShapeError(f"{name} got {shapes}; {inner} (pass a weight as weight.t())")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != b.shape[1]):
        raise ShapeError(f"{name} got bias {tuple(bias.shape)} for b {tuple(b.shape)}; expected ({b.shape[1]},)")
    operands = {"a": a, "b": b} | ({} if bias is None else {"bias": bias})
    for operand, x in operands.items():
        if operand == "b" and frozen:
            pass  # its dtype is the recipe's
        elif x.dtype not in DTYPES:
            raise DTypeError(
                f"{name} got {operand} of {x.dtype}; expected float32, float16 or bfloat16 (cast it with .to)"
            )
        elif x.dtype != a.dtype:
            raise DTypeError(
                f"{name} got a of {a.dtype} and {operand} of {x.dtype}; expected one dtype (cast one with .to)"
            )
        if x.device != a.device:
            raise DeviceError(f"{name} got a on {a.device} and {operand} on {x.device}; move one with .to")
