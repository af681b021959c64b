"""torch.ops.fp8fx.grouped_mm_fp8_<recipe>: rows that are sorted by experts, each times its own expert's weight.

    grouped_mm_fp8_<recipe>(Tensor a, Tensor b, Tensor? offs=None, *, str executor="auto", Tensor? b_scale=None) -> Tensor

As torch's own, it takes a batch without offsets: as many rows for each expert.

The forward GEMM is FP8. A recipe's cast of a weight is that of each expert's weight; a has a scale per row under every recipe, since rows
past the last offset may hold anything and must not touch the others. dgrad and wgrad stay in high precision: torch's grouped GEMM takes
no E5M2, and wgrad contracts over as many rows as an expert happens to get, which FP8 would need in multiples of 16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8fx.errors import DeviceError, DTypeError, ShapeError
from fp8fx.executors import registry
from fp8fx.executors.executor import Executor
from fp8fx.executors.scaled_mm import ALIGNMENT
from fp8fx.ops.autograd import check_transforms, no_tangent, once
from fp8fx.ops.operands import autocast, check_keeps_fp8_weights
from fp8fx.recipes.quantize import Quantized
from fp8fx.recipes.recipe import RECIPES, Cast, Recipe
from fp8fx.torch_internals import OpOverload, guard_or_false

__all__ = ["GEMMS", "grouped_mm_fp8", "op", "quantize_weights"]

GEMMS = ("forward",)
"""The GEMMs that are FP8."""


aten = torch.ops.aten


def quantize_weights(weights: Tensor, cast: Cast, quantize: Callable[[Tensor, Cast, int], Quantized]) -> Quantized:
    """(E, N, K) in FP8 and a scale per output channel (E, N), equal ones where the recipe has one per weight.

    `quantize` is an executor's.
    """
    e, n, k = weights.shape
    whole = cast.granularity == "tensor"  # an expert's weight as one row has one scale
    q = quantize(weights.reshape(e, n * k) if whole else weights.reshape(e * n, k), Cast(cast.format, "row"), -1)
    scale = None if q.scale is None else (q.scale.expand(e, n) if whole else q.scale.view(e, n)).contiguous()
    return Quantized(q.data.view(e, n, k).contiguous(), scale)  # a view where the weights lie as (N, K, E)


def _laid_out(x: Tensor) -> Tensor:
    """`x`, or a copy, in a layout that torch's grouped GEMM takes: rows or columns lie densely, each a multiple of 16 bytes apart."""
    rows, columns, unit = *x.stride()[-2:], 16 // x.element_size()
    by_rows = columns == 1 and rows >= x.shape[-1] and rows % unit == 0
    by_columns = rows == 1 and columns >= x.shape[-2] and columns % unit == 0
    return x if by_rows or by_columns else x.contiguous()


def _dequantized(b: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(E, K, N) of FP8 weights (E, K, N)."""
    return (b.float() * b_scale.unsqueeze(-2)).to(dtype)


class _GroupedMM(torch.autograd.Function):
    """a (M, K), b (E, K, N), offs (E,) -> (M, N), with gradients in high precision."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, offs: Tensor, b_scale: Tensor | None, recipe: Recipe, executor: Executor
    ) -> Tensor:
        gemm, weights = recipe.forward, b.transpose(-2, -1)
        assert gemm is not None
        ctx.save_for_backward(a, b, offs, b_scale)
        ctx.name = f"grouped_mm_fp8_{recipe.name}"
        qa = executor.quantize(_laid_out(a), Cast(gemm.lhs.format, "row"), -1)
        qb = quantize_weights(weights, gemm.rhs, executor.quantize) if b_scale is None else Quantized(weights, b_scale)
        return executor.grouped_matmul(qa, qb, offs, dtype=a.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        twice = torch.is_grad_enabled()  # create_graph=True
        a, b, offs, b_scale = ctx.saved_tensors
        needs_a, needs_b = ctx.needs_input_grad[:2]
        with torch.no_grad():
            a, grad = _laid_out(a), grad.contiguous()
            transposed = (b if b_scale is None else _dequantized(b, b_scale, a.dtype)).transpose(-2, -1)
            grad_a = F.grouped_mm(grad, _laid_out(transposed), offs=offs) if needs_a else None
            grad_b = None
            if (
                needs_b and transposed.is_contiguous()
            ):  # in the weight's own layout: autograd copies a gradient that has another
                grad_b = F.grouped_mm(grad.t(), a, offs=offs).transpose(-2, -1)
            elif needs_b:
                grad_b = F.grouped_mm(a.t(), grad, offs=offs)
        gradients: tuple[Tensor | None, ...] = grad_a, grad_b, None, None
        return *(once(gradients, ctx.name, grad, a, b) if twice else gradients), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        no_tangent(ctx.name)


def _autocast(x: Tensor) -> Tensor:
    """As `autocast`, but what is bfloat16, as a grouped matmul's operands are, torch leaves alone."""
    found: Tensor = x if x.dtype == torch.bfloat16 else autocast(x)
    return found


def _check(name: str, a: Tensor, b: Tensor, offs: Tensor, b_scale: Tensor | None, recipe: Recipe) -> None:
    shapes = f"a {tuple(a.shape)}, b {tuple(b.shape)}, offs {tuple(offs.shape)}"
    if a.dim() != 2 or b.dim() != 3 or offs.dim() != 1 or a.shape[1] != b.shape[1] or offs.shape[0] != b.shape[0]:
        raise ShapeError(f"{name} got {shapes}; expected (M, K), (E, K, N) and (E,)")
    if b.shape[1] % ALIGNMENT or b.shape[2] % ALIGNMENT or 0 in b.shape:
        raise ShapeError(
            f"{name} got {shapes}; expected K and N that are multiples of {ALIGNMENT}, and E of at least 1"
        )
    assert recipe.forward is not None
    operands = [
        ("a", a, torch.bfloat16),
        ("b", b, torch.bfloat16 if b_scale is None else recipe.forward.rhs.format.dtype),
    ]
    operands += [("offs", offs, torch.int32)] + ([] if b_scale is None else [("b_scale", b_scale, torch.float32)])
    if b_scale is not None and b_scale.shape != (b.shape[0], b.shape[2]):
        raise ShapeError(
            f"{name} got b_scale {tuple(b_scale.shape)}; expected {(b.shape[0], b.shape[2])} for b {tuple(b.shape)}"
        )
    for operand, x, expected in operands:
        if x.dtype != expected:
            raise DTypeError(f"{name} got {operand} of {x.dtype}; expected {expected} (cast it with .to)")
        if x.device != a.device:
            raise DeviceError(f"{name} got a on {a.device} and {operand} on {x.device}; move one with .to")


def _batched(recipe: Recipe, a: Tensor, b: Tensor, executor: str, b_scale: Tensor | None) -> Tensor:
    """As bmm, whose operands autocast casts: to another dtype than bfloat16, too, in which the product is in high precision."""
    name, shapes = f"grouped_mm_fp8_{recipe.name}", f"a {tuple(a.shape)}, b {tuple(b.shape)}"
    if a.dim() != 3 or b.dim() != 3 or a.shape[0] not in (1, b.shape[0]) or a.shape[2] != b.shape[1]:
        raise ShapeError(f"{name} got {shapes} and no offs; expected (E, M, K) and (E, K, N)")
    registry.check_name(executor)
    a, b = autocast(a), b if b_scale is not None else autocast(b)
    if a.dtype != torch.bfloat16:
        if b_scale is None and b.dtype != a.dtype:
            raise DTypeError(
                f"{name} got a {a.dtype} and b {b.dtype}; expected the same dtype, bfloat16 to multiply in FP8"
            )
        return a @ (b if b_scale is None else _dequantized(b, b_scale, a.dtype))
    (_, m, k), (e, _, n) = a.shape, b.shape
    offs = (torch.arange(1, e + 1, device=a.device) * m).to(torch.int32)
    rows = a.expand(e, -1, -1).reshape(-1, k)
    return grouped_mm_fp8(recipe, rows, b, offs, executor=executor, b_scale=b_scale).view(e, m, n)


def grouped_mm_fp8(
    recipe: Recipe,
    a: Tensor,
    b: Tensor,
    offs: Tensor | None = None,
    *,
    executor: str = "auto",
    b_scale: Tensor | None = None,
) -> Tensor:
    """`torch.nn.functional.grouped_mm(a, b, offs=offs)` with the forward GEMM in FP8; differentiable in a and b.

    Args:
        recipe: how a and each expert's weight are quantized; a has a scale per row under every recipe.
        a: (M, K), bfloat16, the rows of expert 0 first; without offs (E, M, K), or (1, M, K) for the same rows to each.
        b: (E, K, N), bfloat16; weights (E, N, K) are passed as `weights.transpose(-2, -1)`. K and N are multiples of 16.
        offs: (E,), int32: where each expert's rows end. Rows from the last one on are not computed. None for a batch, as bmm's, which
            may be of another dtype, as autocast may make it: the product is then in high precision.
        executor: `auto`, `scaled_mm`, `simulated` or `bitsandbytes`. Tensor cores multiply groups in FP8 on compute capability 9.0;
            elsewhere `auto` simulates.
        b_scale: (E, N), float32, of a b that is FP8 already, as `quantize_weights` gives both. Such a b has no gradient.

    Returns:
        (M, N) in bfloat16; what is in the rows from the last offset on is not defined. Under autocast the operands are cast first.
        Of a batch (E, M, N).

    Raises:
        ShapeError, DTypeError, DeviceError, ConfigError, ExecutorError, DifferentiationError.
    """
    if offs is None:
        return _batched(recipe, a, b, executor, b_scale)
    name = f"grouped_mm_fp8_{recipe.name}"
    a, b = _autocast(a), b if b_scale is not None else _autocast(b)
    _check(name, a, b, offs, b_scale, recipe)
    check_transforms(name, a, b)
    registry.check_name(executor)
    chosen = registry.resolve(executor, a.device, groups=True)
    if b_scale is not None:
        check_keeps_fp8_weights(name, chosen)
    if guard_or_false(a.shape[0] == 0):
        return (a @ b[0].to(a.dtype)).to(a.dtype)  # which autocast casts
    product: Tensor = _GroupedMM.apply(a, b, offs, b_scale, recipe, chosen)  # type: ignore[no-untyped-call]
    return product


_library = torch.library.Library("fp8fx", "FRAGMENT")


def _register(recipe: Recipe) -> None:
    def implementation(a: Tensor, b: Tensor, offs: Tensor | None = None, **options: Any) -> Tensor:
        return grouped_mm_fp8(recipe, a, b, offs, **options)

    name = f"grouped_mm_fp8_{recipe.name}"
    schema = '(Tensor a, Tensor b, Tensor? offs=None, *, str executor="auto", Tensor? b_scale=None) -> Tensor'
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, implementation, "CompositeImplicitAutograd")


for _recipe in RECIPES.values():
    _register(_recipe)


def op(recipe: str) -> OpOverload:
    """The operator of a recipe's name, as `torch.ops.fp8fx.grouped_mm_fp8_mixed.default`."""
    overload: OpOverload = getattr(torch.ops.fp8fx, f"grouped_mm_fp8_{recipe}").default
    return overload
