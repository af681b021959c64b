"""The matmul whose weight is FP8 already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from fp8fx.executors.executor import Executor
from fp8fx.ops.autograd import no_tangent, once
from fp8fx.ops.operands import may_accumulate_fast
from fp8fx.recipes.quantize import Quantized, dequantize
from fp8fx.recipes.recipe import Recipe
from fp8fx.torch_internals import guard_or_false

__all__ = ["FrozenMatmulFP8"]


def _at_run_time(
    condition: torch.SymBool, yes: Callable[..., Tensor], no: Callable[..., Tensor], operands: tuple[Tensor, ...]
) -> Tensor:
    """Both branches in the graph, of which the condition on a symbolic size chooses one at run time, if it is not known by now."""
    if guard_or_false(condition):
        return yes(*operands)
    if guard_or_false(torch.sym_not(condition)):
        return no(*operands)
    # Inductor takes branches that return tuples alone.
    chosen: tuple[Tensor] = torch.ops.higher_order.cond(
        condition, lambda *xs: (yes(*xs),), lambda *xs: (no(*xs),), operands
    )
    return chosen[0]


class FrozenMatmulFP8(torch.autograd.Function):
    """a (M, K) @ b (K, N) + bias (N,) where b is FP8 already, with its dgrad."""

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        b_scale: Tensor,
        bias: Tensor | None,
        recipe: Recipe,
        bsz: int,
        bsz2: int,
        executor: Executor,
        weight_only: bool,
    ) -> Tensor:
        lhs = recipe.forward.lhs if recipe.forward else None

        def exact(a: Tensor, data: Tensor, scale: Tensor, *bias: Tensor) -> Tensor:
            return executor.matmul(
                Quantized(a, None), Quantized(data, scale), block=bsz, dtype=a.dtype, bias=bias[0] if bias else None
            )

        def quantized(a: Tensor, data: Tensor, scale: Tensor, *bias: Tensor) -> Tensor:
            assert lhs is not None
            qa, qb, addend = executor.quantize(a, lhs, bsz), Quantized(data, scale), bias[0] if bias else None
            return executor.matmul(
                qa, qb, block=bsz, dtype=a.dtype, bias=addend, fast=may_accumulate_fast(a.dtype), never_recomputed=True
            )

        ctx.save_for_backward(b, b_scale)
        ctx.recipe, ctx.bsz2, ctx.executor, ctx.dtype = recipe, bsz2, executor, a.dtype
        m, operands = a.shape[0], (a, b.t(), b_scale, *([] if bias is None else [bias]))
        if isinstance(m, torch.SymInt) and weight_only:
            return _at_run_time(m == 1, exact, quantized, operands)
        return (exact if weight_only and m == 1 else quantized)(*operands)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        twice = torch.is_grad_enabled()  # create_graph=True
        with torch.no_grad():
            grad_a = FrozenMatmulFP8._dgrad(ctx, grad) if ctx.needs_input_grad[0] else None
            gradients: tuple[Tensor | None, ...] = grad_a, None, None, grad.sum(0) if ctx.needs_input_grad[3] else None
        if twice:
            gradients = once(gradients, f"matmul_fp8_{ctx.recipe.name}", grad, *ctx.saved_tensors)
        return *gradients, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        no_tangent(f"matmul_fp8_{ctx.recipe.name}")

    @staticmethod
    def _dgrad(ctx: Any, grad: Tensor) -> Tensor:
        (b, b_scale), gemm = ctx.saved_tensors, ctx.recipe.dgrad
        executor: Executor = ctx.executor
        if gemm is None or gemm.rhs != ctx.recipe.forward.rhs or not gemm.rhs.transposes:
            return grad @ dequantize(Quantized(b.t(), b_scale), -1, ctx.dtype)
        qg, scale = (
            executor.quantize(grad, gemm.lhs, ctx.bsz2),
            b_scale if b_scale.dim() == 0 else b_scale[0, 0],
        )  # a scale per tensor
        return executor.matmul(
            qg, Quantized(b, scale), block=ctx.bsz2, dtype=ctx.dtype, fast=may_accumulate_fast(ctx.dtype)
        )
