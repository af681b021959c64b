"""torch.ops.fp8fx.*: one operator a recipe, all of them this one implementation.

    matmul_fp8_<recipe>(Tensor a, Tensor b, int bsz=-1, int bsz2=-1, *, Tensor? bias=None, str executor="auto",
                        bool forward=True, bool dgrad=True, bool wgrad=True, Tensor? b_scale=None, bool weight_only=False) -> Tensor

The ops are CompositeImplicitAutograd: Dynamo, torch.export and FX see one node, AOTAutograd sees quantize arithmetic and
`aten._scaled_mm`, which Inductor fuses with what stands around it.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from fp8fx.executors import registry
from fp8fx.executors.executor import Executor
from fp8fx.executors.row_major import row_major
from fp8fx.ops.autograd import check_transforms, no_tangent, once
from fp8fx.ops.frozen_matmul import FrozenMatmulFP8
from fp8fx.ops.operands import autocast, check_frozen, check_keeps_fp8_weights, check_operands, may_accumulate_fast
from fp8fx.recipes.formats import check_block_size
from fp8fx.recipes.quantize import Quantized
from fp8fx.recipes.recipe import GEMMS, RECIPES, Recipe
from fp8fx.torch_internals import OpOverload, guard_or_false

__all__ = ["matmul_fp8", "op"]


def _row_major(q: Quantized) -> Quantized:
    return Quantized(row_major(q.data), q.scale)


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
        qa = b_scale = None
        if gemm is None:
            out = a @ b if bias is None else torch.addmm(bias, a, b)
        else:
            qa, qb = executor.quantize(a, gemm.lhs, bsz), executor.quantize(b.t(), gemm.rhs, bsz)
            out = executor.matmul(qa, qb, block=bsz, dtype=a.dtype, bias=bias, fast=may_accumulate_fast(a.dtype))
            b_scale = (
                qb.scale if recipe.dgrad is not None and recipe.dgrad.rhs == gemm.rhs and gemm.rhs.transposes else None
            )
        # wgrad contracts over M, so it reads a^T: in FP8 it is saved as such, one byte a value. dgrad reads the weight
        # the other way round than forward does. The weight outlives the step anyway: only its scale is saved with it.
        at: Quantized | tuple[Tensor | None, None] = (a, None) if needs_b else (None, None)
        if needs_b and recipe.wgrad is not None:
            cast = recipe.wgrad.lhs
            shared = gemm is not None and gemm.lhs == cast and cast.transposes
            at = _row_major(
                Quantized(qa.data.t(), qa.scale) if shared and qa is not None else executor.quantize(a.t(), cast, -1)
            )
        ctx.save_for_backward(*at, b if needs_a else None, b_scale if needs_a else None, anchor)
        ctx.recipe, ctx.bsz2, ctx.executor = recipe, bsz2, executor
        ctx.dtype, ctx.column_major = a.dtype, b.t().is_contiguous()
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        twice = torch.is_grad_enabled()  # create_graph=True
        with torch.no_grad():
            gradients = _MatmulFP8._gradients(ctx, grad)
        if twice:
            gradients = once(gradients, f"matmul_fp8_{ctx.recipe.name}", grad, *ctx.saved_tensors)
        return *gradients, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        no_tangent(f"matmul_fp8_{ctx.recipe.name}")

    @staticmethod
    def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        recipe, bsz2 = ctx.recipe, ctx.bsz2
        executor: Executor = ctx.executor
        at, at_scale, b, b_scale, _ = ctx.saved_tensors
        needs_a, needs_b, needs_bias = ctx.needs_input_grad[:3]
        grad_a = grad_b = qg = None
        if needs_a and recipe.dgrad is not None:
            qg, qb = (
                executor.quantize(grad, recipe.dgrad.lhs, bsz2),
                executor.quantize(b, recipe.dgrad.rhs, bsz2, b_scale),
            )
            grad_a = executor.matmul(qg, qb, block=bsz2, dtype=ctx.dtype, fast=may_accumulate_fast(ctx.dtype))
        elif needs_a:
            grad_a = grad @ b.t()
        if needs_b and recipe.wgrad is not None:
            cast = recipe.wgrad.rhs
            scale = qg.scale if qg is not None and recipe.dgrad.lhs == cast and cast.transposes else None
            # A second cast, which Inductor fuses with the first; it would read the first's result to transpose that.
            qa, qg = Quantized(at, at_scale), _row_major(executor.quantize(grad.t(), cast, -1, scale))
            # In the weight's own layout: autograd copies a gradient that has another.
            lhs, rhs = (qg, qa) if ctx.column_major else (qa, qg)
            grad_b = executor.matmul(lhs, rhs, block=bsz2, dtype=ctx.dtype)
            grad_b = grad_b.t() if ctx.column_major else grad_b
        elif needs_b:
            grad_b = (grad.t() @ at).t() if ctx.column_major else at.t() @ grad
        return grad_a, grad_b, grad.sum(0) if needs_bias else None


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
        executor: `auto`, `scaled_mm`, `simulated` or `bitsandbytes`.
        forward, dgrad, wgrad: False keeps that GEMM in high precision, whatever the recipe says.
        b_scale: float32, of a b that is FP8 already, as `numerics.quantize(weight, recipe.forward.rhs, bsz)` gives both: () for a scale
            per tensor, (N, 1) for one per output channel. Where a has a scale a row that of a tensor may be given as (N, 1) too, all
            equal: so the GEMM takes it, and nothing has to spread it in each call. Such a b has no gradient.
        weight_only: with `b_scale`, an a of a single row is not quantized: the product takes as long as it takes to read b anyway.

    Returns:
        (*, N) in a's dtype. Under autocast the operands are cast first, as for a linear.

    Raises:
        ShapeError, DTypeError, DeviceError, BlockSizeError, ConfigError, ExecutorError, DifferentiationError.

    Source: `matmul_fp8_mixed` and `matmul_fp8_global` of bitsandbytes.research 0.49.2.
    """
    name, frozen = f"matmul_fp8_{recipe.name}", b_scale is not None
    a, b, bias = autocast(a), b if frozen else autocast(b), autocast(bias)
    check_operands(name, a, b, bias, frozen)
    check_transforms(name, a, b)
    registry.check_name(executor)
    chosen = registry.resolve(executor, a.device)
    if not (forward and dgrad and wgrad):
        recipe = recipe.only(gemm for gemm, wanted in zip(GEMMS, (forward, dgrad, wgrad), strict=True) if wanted)
    check_frozen(name, b, b_scale, recipe, weight_only)
    if frozen:
        check_keeps_fp8_weights(name, chosen)
    k, n = b.shape
    if guard_or_false(a.numel() == 0) or n == 0:  # K = 0 included
        out = a @ b.to(a.dtype)
        return out if bias is None else out + bias
    bsz, bsz2 = check_block_size("bsz", bsz, k), check_block_size("bsz2", bsz2, n)
    rows = a.reshape(-1, k)
    product: Tensor
    if b_scale is not None:
        product = FrozenMatmulFP8.apply(rows, b, b_scale, bias, recipe, bsz, bsz2, chosen, weight_only)  # type: ignore[no-untyped-call]
    else:
        # An FP8 a^T has no history: without this empty tensor, which has a's, a second derivative would miss a silently.
        anchored = recipe.wgrad is not None and torch.is_grad_enabled() and rows.requires_grad and b.requires_grad
        anchor = rows[:0].clone() if anchored else None
        product = _MatmulFP8.apply(rows, b, bias, anchor, recipe, bsz, bsz2, chosen)  # type: ignore[no-untyped-call]
    return product if a.dim() == 2 else product.reshape(*a.shape[:-1], n)  # a view, as torch's own may be


_library = torch.library.Library("fp8fx", "DEF")


def _register(recipe: Recipe) -> None:
    def implementation(a: Tensor, b: Tensor, bsz: int = -1, bsz2: int = -1, **options: Any) -> Tensor:
        return matmul_fp8(recipe, a, b, bsz, bsz2, **options)

    name = f"matmul_fp8_{recipe.name}"
    operands = 'Tensor a, Tensor b, int bsz=-1, int bsz2=-1, *, Tensor? bias=None, str executor="auto"'
    frozen = "Tensor? b_scale=None, bool weight_only=False"
    schema = f"({operands}, bool forward=True, bool dgrad=True, bool wgrad=True, {frozen}) -> Tensor"
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, implementation, "CompositeImplicitAutograd")


for _recipe in RECIPES.values():
    _register(_recipe)


def op(recipe: str) -> OpOverload:
    """The operator of a recipe's name, as `torch.ops.fp8fx.matmul_fp8_mixed.default`."""
    overload: OpOverload = getattr(torch.ops.fp8fx, f"matmul_fp8_{recipe}").default
    return overload
