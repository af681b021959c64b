"""What the ops check of their arguments. `name` is the op's own, as the errors have it."""

from __future__ import annotations

import torch
from torch import Tensor

from fp8fx.errors import ConfigError, DeviceError, DTypeError, ExecutorError, ShapeError
from fp8fx.executors import registry
from fp8fx.executors.executor import Executor
from fp8fx.executors.scaled_mm import ALIGNMENT
from fp8fx.ops.operands import DTYPES
from fp8fx.recipes.recipe import Recipe

__all__ = ["check_batched", "check_frozen", "check_grouped", "check_keeps_fp8_weights", "check_operands"]


def check_keeps_fp8_weights(name: str, executor: Executor) -> None:
    """Raises ExecutorError if the executor cannot multiply a weight that is FP8 already."""
    if not executor.keeps_fp8_weights:
        others = " or ".join(map(repr, registry.names_that_keep_fp8_weights()))
        raise ExecutorError(f"{name} got a b_scale; executor {executor.name!r} keeps no FP8 weights (use {others})")


def _check_device(name: str, x: Tensor, other: Tensor, x_name: str, other_name: str) -> None:
    if other.device != x.device:
        raise DeviceError(f"{name} got {x_name} on {x.device} and {other_name} on {other.device}; move one with .to")


def _check_scale_shape(name: str, b: Tensor, b_scale: Tensor, *expected: tuple[int, ...]) -> None:
    if tuple(b_scale.shape) not in expected:
        shapes = " or ".join(map(str, expected))
        raise ShapeError(f"{name} got b_scale {tuple(b_scale.shape)}; expected {shapes} for b {tuple(b.shape)}")


def check_operands(name: str, a: Tensor, b: Tensor, bias: Tensor | None, frozen: bool) -> None:
    """The operands of a matmul: a (*, K), b (K, N), bias (N,), of one dtype on one device.

    The dtype of a `frozen` b is the recipe's: `check_frozen`.

    Raises:
        ShapeError, DTypeError, DeviceError.
    """
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
        if operand != "b" or not frozen:
            _check_dtype(name, a, x, operand)
        _check_device(name, a, x, "a", operand)


def _check_dtype(name: str, a: Tensor, x: Tensor, operand: str) -> None:
    if x.dtype not in DTYPES:
        raise DTypeError(f"{name} got {operand} of {x.dtype}; expected float32, float16 or bfloat16 (cast it with .to)")
    if x.dtype != a.dtype:
        raise DTypeError(
            f"{name} got a of {a.dtype} and {operand} of {x.dtype}; expected one dtype (cast one with .to)"
        )


def check_frozen(name: str, b: Tensor, b_scale: Tensor | None, recipe: Recipe, weight_only: bool) -> None:
    """A weight b (K, N) that is FP8 already, with its scale, and the forward GEMM to use it in.

    Raises:
        ConfigError: no forward GEMM is FP8; or `weight_only`, and no such weight.
        ShapeError, DTypeError, DeviceError.
    """
    if b_scale is None:
        if weight_only:
            raise ConfigError(f"{name} got weight_only=True and no b_scale; it is for a weight that is FP8 already")
        return
    if recipe.forward is None:
        raise ConfigError(f"{name} got a b_scale and a forward in high precision; leave b_scale out, or forward=True")
    cast = recipe.forward.rhs
    if b.dtype != cast.format.dtype:
        raise DTypeError(
            f"{name} got b of {b.dtype} with a b_scale; expected b as {cast.format.dtype}, as the recipe quantizes it"
        )
    if b_scale.dtype != torch.float32:
        raise DTypeError(f"{name} got b_scale of {b_scale.dtype}; expected torch.float32")
    _check_scale_shape(name, b, b_scale, *_scale_shapes(recipe, b.shape[1]))
    _check_device(name, b, b_scale, "b", "b_scale")


def _scale_shapes(recipe: Recipe, n: int) -> list[tuple[int, ...]]:
    """The shapes that the scale of a weight of `n` output channels may have."""
    assert recipe.forward is not None
    b_has_one = recipe.forward.rhs.granularity == "tensor"
    return [(), (n, 1)] if b_has_one else [(n, 1)]


def check_grouped(name: str, a: Tensor, b: Tensor, offs: Tensor, b_scale: Tensor | None, recipe: Recipe) -> None:
    """The operands of a grouped matmul: a (M, K), b (E, K, N), offs (E,) and b_scale (E, N), on one device.

    Raises:
        ShapeError, DTypeError, DeviceError.
    """
    shapes = f"a {tuple(a.shape)}, b {tuple(b.shape)}, offs {tuple(offs.shape)}"
    if a.dim() != 2 or b.dim() != 3 or offs.dim() != 1 or a.shape[1] != b.shape[1] or offs.shape[0] != b.shape[0]:
        raise ShapeError(f"{name} got {shapes}; expected (M, K), (E, K, N) and (E,)")
    if b.shape[1] % ALIGNMENT or b.shape[2] % ALIGNMENT or 0 in b.shape:
        raise ShapeError(
            f"{name} got {shapes}; expected K and N that are multiples of {ALIGNMENT}, and E of at least 1"
        )
    assert recipe.forward is not None
    b_dtype = torch.bfloat16 if b_scale is None else recipe.forward.rhs.format.dtype
    operands = [("a", a, torch.bfloat16), ("b", b, b_dtype), ("offs", offs, torch.int32)]
    if b_scale is not None:
        _check_scale_shape(name, b, b_scale, (b.shape[0], b.shape[2]))
        operands.append(("b_scale", b_scale, torch.float32))
    for operand, x, expected in operands:
        if x.dtype != expected:
            raise DTypeError(f"{name} got {operand} of {x.dtype}; expected {expected} (cast it with .to)")
        _check_device(name, a, x, "a", operand)


def check_batched(name: str, a: Tensor, b: Tensor) -> None:
    """The shapes of a grouped matmul without offsets: a (E, M, K) or (1, M, K), b (E, K, N).

    Raises:
        ShapeError.
    """
    if a.dim() != 3 or b.dim() != 3 or a.shape[0] not in (1, b.shape[0]) or a.shape[2] != b.shape[1]:
        shapes = f"a {tuple(a.shape)}, b {tuple(b.shape)}"
        raise ShapeError(f"{name} got {shapes} and no offs; expected (E, M, K) and (E, K, N)")
