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

__all__ = ["FrozenMatmulFP8", "dgrad", "product"]


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


def dgrad(
    grad: Tensor, operand: tuple[Tensor, Tensor], recipe: Recipe, block: int, executor: Executor, dtype: torch.dtype
) -> Tensor:
    """grad (M, N) @ b (K, N)^T of an operand b that is FP8 already: (M, K) in `dtype`.

    It is in FP8 if the recipe's dgrad can read b as forward does. The operand's scale is () or (N, 1). If it differs
    from one output channel to another, as that of weights side by side does, it goes into grad.
    """
    b, b_scale = operand
    gemm = recipe.dgrad
    assert recipe.forward is not None
    if gemm is None or not recipe.forward.rhs.shares_scale(gemm.rhs):
        return grad @ dequantize(Quantized(b.t(), b_scale), -1, dtype)
    if b_scale.dim() > 0:
        largest = b_scale.amax()  # not one of them: Inductor's GEMM takes no view of a part for a scale
        grad = grad.float() * (b_scale / largest).t()
        b_scale = largest
    qg = executor.quantize(grad, gemm.lhs, block)
    return executor.matmul(qg, Quantized(b, b_scale), block=block, dtype=dtype, fast=may_accumulate_fast(dtype))


def product(
    a: Tensor, weight: Quantized, bias: Tensor | None, recipe: Recipe, block: int, executor: Executor
) -> Tensor:
    """a (M, K) @ weight (N, K)^T + bias (N,) of a weight that is FP8 already: (M, N) in a's dtype."""
    assert recipe.forward is not None
    return executor.matmul(
        executor.quantize(a, recipe.forward.lhs, block),
        weight,
        block=block,
        dtype=a.dtype,
        bias=bias,
        fast=may_accumulate_fast(a.dtype),
        never_recomputed=True,
    )


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
        def exact(a: Tensor, data: Tensor, scale: Tensor, *bias: Tensor) -> Tensor:
            qa = Quantized(a, None)
            qb = Quantized(data, scale)
            return executor.matmul(qa, qb, block=bsz, dtype=a.dtype, bias=bias[0] if bias else None)

        def quantized(a: Tensor, data: Tensor, scale: Tensor, *bias: Tensor) -> Tensor:
            return product(a, Quantized(data, scale), bias[0] if bias else None, recipe, bsz, executor)

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
            grad_a = dgrad(grad, saved, ctx.recipe, ctx.bsz2, ctx.executor, ctx.dtype) if needs_a else None
            gradients: tuple[Tensor | None, ...] = grad_a, None, None, grad.sum(0) if needs_bias else None
        if creates_graph:
            name = register.name_of("matmul", ctx.recipe.name)
            gradients = refuse_second_derivative(gradients, name, grad, *saved)
        return *gradients, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:  # noqa: D102
        refuse_forward_mode(register.name_of("matmul", ctx.recipe.name))
