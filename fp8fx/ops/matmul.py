"""torch.ops.fp8fx.matmul_fp8_<recipe>: one operator a recipe, all of them this one implementation.

    matmul_fp8_<recipe>(Tensor a, Tensor b, int bsz=-1, int bsz2=-1, *, Tensor? bias=None, str executor="auto",
                        bool forward=True, bool dgrad=True, bool wgrad=True,
                        Tensor? b_scale=None, bool weight_only=False) -> Tensor

AOTAutograd sees its quantizations and `aten._scaled_mm`, which Inductor fuses with what stands around it.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from fp8fx.executors import registry
from fp8fx.executors.executor import Executor
from fp8fx.executors.row_major import row_major
from fp8fx.ops import register
from fp8fx.ops.autograd import check_transforms, refuse_forward_mode, refuse_second_derivative
from fp8fx.ops.checks import check_frozen, check_keeps_fp8_weights, check_operands
from fp8fx.ops.fp8_tensor import FP8Tensor
from fp8fx.ops.frozen_matmul import FrozenMatmulFP8
from fp8fx.ops.operands import autocast, may_accumulate_fast
from fp8fx.recipes.formats import check_block_size
from fp8fx.recipes.quantize import Quantized
from fp8fx.recipes.recipe import GEMMS, Recipe
from fp8fx.torch_internals import OpOverload, guard_or_false

__all__ = ["matmul_fp8", "op"]


class _MatmulFP8(torch.autograd.Function):
    """a (M, K) @ b (K, N) + bias (N,) by a recipe, with its dgrad and wgrad."""

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        bias: Tensor | None,
        anchor: Tensor | None,
        recipe: Recipe,
        bsz: int,
        bsz2: int,
        executor: Executor,
    ) -> Tensor:
        gemm = recipe.forward
        needs_a, needs_b = ctx.needs_input_grad[:2]
        qa = None
        b_scale = None
        if gemm is None:
            out = a @ b if bias is None else torch.addmm(bias, a, b)
        else:
            qa = executor.quantize(a, gemm.lhs, bsz)
            qb = executor.quantize(b.t(), gemm.rhs, bsz)
            out = executor.matmul(qa, qb, block=bsz, dtype=a.dtype, bias=bias, fast=may_accumulate_fast(a.dtype))
            if recipe.dgrad is not None and gemm.rhs.shares_scale(recipe.dgrad.rhs):
                b_scale = qb.scale
        # dgrad reads the weight the other way round than forward does. The weight outlives the step anyway: only its
        # scale is saved with it.
        saved: Quantized | tuple[Tensor | None, None] = (None, None)
        if needs_b:
            saved = _MatmulFP8._for_wgrad(a, qa, recipe, executor)
        ctx.save_for_backward(*saved, b if needs_a else None, b_scale if needs_a else None, anchor)
        ctx.recipe = recipe
        ctx.bsz2 = bsz2
        ctx.executor = executor
        ctx.dtype = a.dtype
        ctx.column_major = b.t().is_contiguous()
        return out

    @staticmethod
    def _for_wgrad(
        a: Tensor, qa: Quantized | None, recipe: Recipe, executor: Executor
    ) -> Quantized | tuple[Tensor, None]:
        """What wgrad contracts over M: a^T in FP8, one byte a value; or a itself if wgrad is in high precision."""
        if recipe.wgrad is None:
            return a, None
        cast = recipe.wgrad.lhs
        if qa is not None and recipe.forward is not None and recipe.forward.lhs.shares_scale(cast):
            return _row_major(Quantized(qa.data.t(), qa.scale))
        return _row_major(executor.quantize(a.t(), cast, -1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        creates_graph = torch.is_grad_enabled()
        lhs, lhs_scale, b, b_scale, anchor = ctx.saved_tensors  # read once: a checkpoint unpacks them once
        needs_a, needs_b, needs_bias = ctx.needs_input_grad[:3]
        grad_a = None
        grad_b = None
        grad_scale = None
        with torch.no_grad():
            if needs_a:
                grad_a, grad_scale = _MatmulFP8._dgrad(ctx, grad, b, b_scale)
            if needs_b:
                grad_b = _MatmulFP8._wgrad(ctx, grad, grad_scale, lhs, lhs_scale)
            gradients: tuple[Tensor | None, ...] = grad_a, grad_b, grad.sum(0) if needs_bias else None
        if creates_graph:
            name = register.name_of("matmul", ctx.recipe.name)
            saved = lhs, lhs_scale, b, b_scale, anchor
            gradients = refuse_second_derivative(gradients, name, grad, *saved)
        return *gradients, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        refuse_forward_mode(register.name_of("matmul", ctx.recipe.name))

    @staticmethod
    def _dgrad(ctx: Any, grad: Tensor, b: Tensor, b_scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The gradient of a (M, K), and the scale of `grad` (M, N) if wgrad takes the same."""
        recipe: Recipe = ctx.recipe
        executor: Executor = ctx.executor
        if recipe.dgrad is None:
            return grad @ b.t(), None
        qg = executor.quantize(grad, recipe.dgrad.lhs, ctx.bsz2)
        qb = executor.quantize(b, recipe.dgrad.rhs, ctx.bsz2, b_scale)
        grad_a = executor.matmul(qg, qb, block=ctx.bsz2, dtype=ctx.dtype, fast=may_accumulate_fast(ctx.dtype))
        shares_scale = recipe.wgrad is not None and recipe.dgrad.lhs.shares_scale(recipe.wgrad.rhs)
        return grad_a, qg.scale if shares_scale else None

    @staticmethod
    def _wgrad(ctx: Any, grad: Tensor, grad_scale: Tensor | None, lhs: Tensor, lhs_scale: Tensor | None) -> Tensor:
        """The gradient of b (K, N), in the weight's own layout: autograd copies a gradient that has another.

        `lhs` and its scale are those of `_for_wgrad`.
        """
        recipe: Recipe = ctx.recipe
        executor: Executor = ctx.executor
        if recipe.wgrad is None:
            return (grad.t() @ lhs).t() if ctx.column_major else lhs.t() @ grad
        qa = Quantized(lhs, lhs_scale)
        # A second cast, which Inductor fuses with dgrad's; it would read the result of dgrad's to transpose that.
        qg = _row_major(executor.quantize(grad.t(), recipe.wgrad.rhs, -1, grad_scale))
        if ctx.column_major:
            return executor.matmul(qg, qa, block=ctx.bsz2, dtype=ctx.dtype).t()
        return executor.matmul(qa, qg, block=ctx.bsz2, dtype=ctx.dtype)


def _row_major(q: Quantized) -> Quantized:
    return Quantized(row_major(q.data), q.scale)


def matmul_fp8(
    recipe: Recipe,
    a: Tensor,
    b: Tensor,
    bsz: int = -1,
    bsz2: int = -1,
    *,
    bias: Tensor | None = None,
    executor: str = "auto",
    forward: bool = True,
    dgrad: bool = True,
    wgrad: bool = True,
    b_scale: Tensor | None = None,
    weight_only: bool = False,
) -> Tensor:
    """`a @ b + bias` with both operands in FP8, as `recipe` says; differentiable in a, b and bias.

    Args:
        recipe: which operand of which GEMM is quantized, and how.
        a: (*, K), float32, float16 or bfloat16.
        b: (K, N), the same dtype; a weight (N, K) is passed as `weight.t()`.
        bsz: block size along K, from the ladder; -1 derives it from K. 4096 means the whole row.
        bsz2: block size of the gradient along N, likewise.
        bias: (N,), the same dtype.
        executor: `auto`, or the name of one: `scaled_mm`, `simulated` or `bitsandbytes`.
        forward, dgrad, wgrad: False keeps that GEMM in high precision, whatever the recipe says.
        b_scale: float32, of a b that is FP8 already: `quantize(weight, recipe.forward.rhs, bsz)` gives both. () for a
            scale per tensor, (N, 1) for one per output channel. If a has a scale a row, that of a tensor may be given
            as (N, 1) also, all equal: so the GEMM takes it, and nothing has to spread it in each call. Such a b has no
            gradient.
        weight_only: with `b_scale`, an a of a single row is not quantized: the product takes as long as to read b
            anyway.

    Returns:
        (*, N) in a's dtype. Under autocast the operands are cast first, as for a linear.

    Raises:
        ShapeError, DTypeError, DeviceError, BlockSizeError, ConfigError, ExecutorError, DifferentiationError.

    Example:
        >>> a, weight = torch.randn(3, 64), torch.randn(32, 64)
        >>> torch.ops.fp8fx.matmul_fp8_mixed(a, weight.t()).shape
        torch.Size([3, 32])

    Source: `matmul_fp8_mixed` and `matmul_fp8_global` of bitsandbytes.research 0.49.2.
    """
    name = register.name_of("matmul", recipe.name)
    if isinstance(b, FP8Tensor):
        b, b_scale = b.as_operand()
    frozen = b_scale is not None
    a, b, bias = autocast(a), b if frozen else autocast(b), autocast(bias)
    check_operands(name, a, b, bias, frozen)
    check_transforms(name, a, b)
    registry.check_name(executor)
    resolved = registry.resolve(executor, a.device)
    if not (forward and dgrad and wgrad):
        recipe = recipe.only(gemm for gemm, wanted in zip(GEMMS, (forward, dgrad, wgrad), strict=True) if wanted)
    check_frozen(name, b, b_scale, recipe, weight_only)
    if frozen:
        check_keeps_fp8_weights(name, resolved)
    k, n = b.shape
    if guard_or_false(a.numel() == 0) or n == 0:  # K = 0 included
        out = a @ b.to(a.dtype)
        return out if bias is None else out + bias
    bsz = check_block_size("bsz", bsz, k)
    bsz2 = check_block_size("bsz2", bsz2, n)
    rows = a.reshape(-1, k)
    product: Tensor
    if b_scale is not None:
        product = FrozenMatmulFP8.apply(rows, b, b_scale, bias, recipe, bsz, bsz2, resolved, weight_only)  # type: ignore[no-untyped-call]
    else:
        # An FP8 a^T has no history: without this empty tensor, which has a's, a second derivative would miss a
        # silently.
        anchored = recipe.wgrad is not None and torch.is_grad_enabled() and rows.requires_grad and b.requires_grad
        anchor = rows[:0].clone() if anchored else None
        product = _MatmulFP8.apply(rows, b, bias, anchor, recipe, bsz, bsz2, resolved)  # type: ignore[no-untyped-call]
    return product if a.dim() == 2 else product.reshape(*a.shape[:-1], n)  # a view, as torch's own may be


register.register(
    "matmul",
    'Tensor a, Tensor b, int bsz=-1, int bsz2=-1, *, Tensor? bias=None, str executor="auto", '
    "bool forward=True, bool dgrad=True, bool wgrad=True, Tensor? b_scale=None, bool weight_only=False",
    matmul_fp8,
)


def op(recipe: str) -> OpOverload:
    """The operator of a recipe's name, such as `torch.ops.fp8fx.matmul_fp8_mixed.default`."""
    return register.overload("matmul", recipe)
