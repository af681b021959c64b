"""The matmul whose weight is FP8 already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from fp8fx.executors.executor import Executor
from fp8fx.ops import register
from fp8fx.ops.autograd import refuse_forward_mode, refuse_second_derivative
from fp8fx.ops.operands import may_accumulate_fast
from fp8fx.recipes.quantize import Quantized, dequantize
from fp8fx.recipes.recipe import Recipe
from fp8fx.torch_internals import guard_or_false

__all__ = ["FrozenMatmulFP8"]


def _at_run_time(
    condition: torch.SymBool, yes: Callable[..., Tensor], no: Callable[..., Tensor], operands: tuple[Tensor, ...]
) -> Tensor:
    """`yes` or `no` of the operands, by a condition on a symbolic size.

    If it is not known by now, both are in the graph and run time chooses.
    """
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
    """a (M, K) @ b (K, N) + bias (N,) with a b that is FP8 already, and its dgrad."""

    @staticmethod
    def forward(  # noqa: D102
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
            qa = Quantized(a, None)
            qb = Quantized(data, scale)
            return executor.matmul(qa, qb, block=bsz, dtype=a.dtype, bias=bias[0] if bias else None)

        def quantized(a: Tensor, data: Tensor, scale: Tensor, *bias: Tensor) -> Tensor:
            assert lhs is not None
            return executor.matmul(
                executor.quantize(a, lhs, bsz),
                Quantized(data, scale),
                block=bsz,
                dtype=a.dtype,
                bias=bias[0] if bias else None,
                fast=may_accumulate_fast(a.dtype),
                never_recomputed=True,
            )

        ctx.save_for_backward(b, b_scale)
        ctx.recipe = recipe
        ctx.bsz2 = bsz2
        ctx.executor = executor
        ctx.dtype = a.dtype
        m = a.shape[0]
        operands = (a, b.t(), b_scale, *([] if bias is None else [bias]))
        if isinstance(m, torch.SymInt) and weight_only:
            return _at_run_time(m == 1, exact, quantized, operands)
        return (exact if weight_only and m == 1 else quantized)(*operands)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        creates_graph = torch.is_grad_enabled()
        needs_a, _, _, needs_bias = ctx.needs_input_grad[:4]
        # They are read only if they are needed: hooks may unpack them, and they may be freed.
        saved: Any = ctx.saved_tensors if needs_a or creates_graph else ()
        with torch.no_grad():
            grad_a = FrozenMatmulFP8._dgrad(ctx, grad, *saved) if needs_a else None
            gradients: tuple[Tensor | None, ...] = grad_a, None, None, grad.sum(0) if needs_bias else None
        if creates_graph:
            name = register.name_of("matmul", ctx.recipe.name)
            gradients = refuse_second_derivative(gradients, name, grad, *saved)
        return *gradients, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:  # noqa: D102
        refuse_forward_mode(register.name_of("matmul", ctx.recipe.name))

    @staticmethod
    def _dgrad(ctx: Any, grad: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
        """The gradient of a (M, K); in FP8 if the recipe's dgrad can read b as forward does."""
        executor: Executor = ctx.executor
        gemm = ctx.recipe.dgrad
        if gemm is None or not ctx.recipe.forward.rhs.shares_scale(gemm.rhs):
            return grad @ dequantize(Quantized(b.t(), b_scale), -1, ctx.dtype)
        qg = executor.quantize(grad, gemm.lhs, ctx.bsz2)
        qb = Quantized(b, b_scale if b_scale.dim() == 0 else b_scale[0, 0])  # a scale per tensor
        return executor.matmul(qg, qb, block=ctx.bsz2, dtype=ctx.dtype, fast=may_accumulate_fast(ctx.dtype))
