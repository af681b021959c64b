"""torch.ops.fp8fx.grouped_mm_fp8_<recipe>: rows that are sorted by experts, each times its own expert's weight.

    grouped_mm_fp8_<recipe>(Tensor a, Tensor b, Tensor? offs=None, *, str executor="auto",
                            Tensor? b_scale=None) -> Tensor

Like torch's own, it takes a batch without offsets: as many rows for each expert.

The forward GEMM is FP8. A recipe's cast of a weight is that of each expert's weight. a has a scale per row under every
recipe: rows past the last offset may hold anything and must not touch the others. dgrad and wgrad stay in high
precision: torch's grouped GEMM takes no E5M2, and wgrad contracts over as many rows as an expert happens to get, which
FP8 would need in multiples of 16.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8fx.errors import DTypeError
from fp8fx.executors import registry
from fp8fx.executors.executor import Executor
from fp8fx.ops import register
from fp8fx.ops.autograd import check_transforms, refuse_forward_mode, refuse_second_derivative
from fp8fx.ops.checks import check_batched, check_grouped, check_keeps_fp8_weights
from fp8fx.ops.fp8_tensor import FP8Tensor
from fp8fx.ops.operands import autocast
from fp8fx.recipes.quantize import Quantized, quantize_experts
from fp8fx.recipes.recipe import Cast, Recipe
from fp8fx.torch_internals import OpOverload, guard_or_false

__all__ = ["GEMMS", "grouped_mm_fp8", "op"]

GEMMS = ("forward",)
"""The GEMMs that are FP8."""


def _laid_out(x: Tensor) -> Tensor:
    """`x`, or a copy, in a layout that torch's grouped GEMM takes.

    Its rows or its columns lie densely, each a multiple of 16 bytes apart.
    """
    row_stride, column_stride = x.stride()[-2:]
    unit = 16 // x.element_size()
    by_rows = column_stride == 1 and row_stride >= x.shape[-1] and row_stride % unit == 0
    by_columns = row_stride == 1 and column_stride >= x.shape[-2] and column_stride % unit == 0
    return x if by_rows or by_columns else x.contiguous()


def _dequantized(b: Tensor, b_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weights (E, K, N) in `dtype`; as they are if they have no scale."""
    return b if b_scale is None else (b.float() * b_scale.unsqueeze(-2)).to(dtype)


class _GroupedMM(torch.autograd.Function):
    """a (M, K), b (E, K, N), offs (E,) -> (M, N), with gradients in high precision."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, offs: Tensor, b_scale: Tensor | None, recipe: Recipe, executor: Executor
    ) -> Tensor:
        gemm = recipe.forward
        assert gemm is not None
        weights = b.transpose(-2, -1)
        ctx.save_for_backward(a, b, offs, b_scale)
        ctx.name = register.name_of("grouped_mm", recipe.name)
        qa = executor.quantize(_laid_out(a), Cast(gemm.lhs.format, "row"), -1)
        qb = quantize_experts(weights, gemm.rhs, executor.quantize) if b_scale is None else Quantized(weights, b_scale)
        return executor.grouped_matmul(qa, qb, offs, dtype=a.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        creates_graph = torch.is_grad_enabled()
        a, b, offs, b_scale = ctx.saved_tensors
        needs_a, needs_b = ctx.needs_input_grad[:2]
        grad_a = None
        grad_b = None
        with torch.no_grad():
            a = _laid_out(a)
            grad = grad.contiguous()
            weights = _dequantized(b, b_scale, a.dtype).transpose(-2, -1)
            if needs_a:
                grad_a = F.grouped_mm(grad, _laid_out(weights), offs=offs)
            # In the weight's own layout: autograd copies a gradient that has another.
            if needs_b and weights.is_contiguous():
                grad_b = F.grouped_mm(grad.t(), a, offs=offs).transpose(-2, -1)
            elif needs_b:
                grad_b = F.grouped_mm(a.t(), grad, offs=offs)
        gradients: tuple[Tensor | None, ...] = grad_a, grad_b
        if creates_graph:
            gradients = refuse_second_derivative(gradients, ctx.name, grad, a, b)
        return *gradients, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        refuse_forward_mode(ctx.name)


def _autocast(x: Tensor) -> Tensor:
    """As `autocast`, but bfloat16, which a grouped matmul's operands have, stays: torch leaves these alone."""
    operand: Tensor = x if x.dtype == torch.bfloat16 else autocast(x)
    return operand


def _batched(recipe: Recipe, a: Tensor, b: Tensor, executor: str, b_scale: Tensor | None) -> Tensor:
    """As bmm, whose operands autocast casts; if that is not to bfloat16, the product is in high precision."""
    name = register.name_of("grouped_mm", recipe.name)
    check_batched(name, a, b)
    registry.check_name(executor)
    a, b = autocast(a), b if b_scale is not None else autocast(b)
    if a.dtype != torch.bfloat16:
        if b_scale is None and b.dtype != a.dtype:
            raise DTypeError(
                f"{name} got a {a.dtype} and b {b.dtype}; expected the same dtype, bfloat16 to multiply in FP8"
            )
        return a @ _dequantized(b, b_scale, a.dtype)
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
        b: (E, K, N), bfloat16; weights (E, N, K) are passed as `weights.transpose(-2, -1)`. K and N are multiples of
            16.
        offs: (E,), int32: where each expert's rows end. Rows from the last one on are not computed. None for a batch,
            as bmm's. A batch may be of another dtype, as autocast may make it: the product is then in high precision.
        executor: `auto`, or the name of one: `scaled_mm`, `simulated` or `bitsandbytes`. Tensor cores multiply groups
            in FP8 on compute capability 9.0; elsewhere `auto` simulates.
        b_scale: (E, N), float32, of a b that is FP8 already: `quantize_experts` gives both. Such a b has no gradient.

    Returns:
        (M, N) in bfloat16; what is in the rows from the last offset on is not defined. Of a batch (E, M, N). Under
        autocast the operands are cast first.

    Raises:
        ShapeError, DTypeError, DeviceError, ConfigError, ExecutorError, DifferentiationError.

    Example:
        >>> a, weights = torch.randn(8, 64).bfloat16(), torch.randn(2, 32, 64).bfloat16()
        >>> offs = torch.tensor([3, 8], dtype=torch.int32)
        >>> torch.ops.fp8fx.grouped_mm_fp8_mixed(a, weights.transpose(-2, -1), offs).shape
        torch.Size([8, 32])
    """
    if isinstance(b, FP8Tensor):
        b, b_scale = b.as_operand()
    if offs is None:
        return _batched(recipe, a, b, executor, b_scale)
    name = register.name_of("grouped_mm", recipe.name)
    a, b = _autocast(a), b if b_scale is not None else _autocast(b)
    check_grouped(name, a, b, offs, b_scale, recipe)
    check_transforms(name, a, b)
    registry.check_name(executor)
    resolved = registry.resolve(executor, a.device, groups=True)
    if b_scale is not None:
        check_keeps_fp8_weights(name, resolved)
    if guard_or_false(a.shape[0] == 0):
        return (a @ b[0].to(a.dtype)).to(a.dtype)  # which autocast casts
    product: Tensor = _GroupedMM.apply(a, b, offs, b_scale, recipe, resolved)  # type: ignore[no-untyped-call]
    return product


register.register(
    "grouped_mm",
    'Tensor a, Tensor b, Tensor? offs=None, *, str executor="auto", Tensor? b_scale=None',
    grouped_mm_fp8,
)


def op(recipe: str) -> OpOverload:
    """The operator of a recipe's name, such as `torch.ops.fp8fx.grouped_mm_fp8_mixed.default`."""
    return register.overload("grouped_mm", recipe)
