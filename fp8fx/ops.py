"""torch.ops.fp8fx.*: one operator a recipe, all of them this one implementation.

    matmul_fp8_<recipe>(Tensor a, Tensor b, int bsz=-1, int bsz2=-1, *, Tensor? bias=None, str executor="auto",
                        bool forward=True, bool dgrad=True, bool wgrad=True, Tensor? b_scale=None, bool weight_only=False) -> Tensor

The ops are CompositeImplicitAutograd: Dynamo, torch.export and FX see one node, AOTAutograd sees quantize arithmetic and
`aten._scaled_mm`, which Inductor fuses with what stands around it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from fp8fx import kernels
from fp8fx.config import EXECUTORS, GEMMS, RECIPES, Recipe, unknown
from fp8fx.errors import ConfigError, DeviceError, DifferentiationError, DTypeError, ExecutorError, ShapeError
from fp8fx.formats import check_block_size
from fp8fx.hardware import resolve
from fp8fx.kernels.row_major import row_major
from fp8fx.numerics import Quantized, dequantize
from fp8fx.torch_internals import OpOverload, guard_or_false, is_gradtrackingtensor

__all__ = ["DTYPES", "autocast", "check_transforms", "matmul_fp8", "no_tangent", "once", "op"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes that are quantized."""


def _fast(dtype: torch.dtype) -> bool:
    """Whether forward and dgrad may use fast accumulation: it errs by 1.4e-3, below bfloat16's rounding and above that of the others.

    wgrad never does. Its sums run over all rows of a batch, without a weight's changing signs: where they grow instead of
    cancelling, fast accumulation loses 4 % over 16,384 rows and 18 % over 65,536 (docs/numerics.md).
    """
    return dtype == torch.bfloat16


def _row_major(q: Quantized) -> Quantized:
    return Quantized(row_major(q.data), q.scale)


class _Once(torch.autograd.Function):
    """A gradient that is computed but cannot be differentiated: rounding has no useful derivative."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, name: str, *dependencies: Tensor) -> Tensor:
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise DifferentiationError(
            f"a gradient of {ctx.name} was differentiated again; its quantization has no second derivative. "
            "Leave the linears behind such a loss in high precision: exclude them by their module paths"
        )


def once(gradients: tuple[Tensor | None, ...], name: str, *dependencies: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of the op of that name, so that their own gradient, by what they depend on, is an error."""
    found = [x for x in dependencies if x is not None and x.is_floating_point()]
    return tuple(g if g is None else _Once.apply(g, name, *found) for g in gradients)  # type: ignore[no-untyped-call]


def no_tangent(name: str) -> NoReturn:
    """Raises DifferentiationError where the op of that name is differentiated in forward mode."""
    raise DifferentiationError(
        f"{name} was differentiated in forward mode (torch.autograd.forward_ad, torch.func.linearize), for which it has no rule; use "
        'backward, or torch.compile(..., backend="fp8") around it all, which leaves such linears in high precision'
    )


class _MatmulFP8(torch.autograd.Function):
    """a (M, K) @ b (K, N) + bias (N,) by a recipe, with its dgrad and wgrad."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, bias: Tensor | None, anchor: Tensor | None, recipe: Recipe, bsz: int, bsz2: int, executor: str
    ) -> Tensor:
        run, gemm = kernels.get(executor), recipe.forward
        needs_a, needs_b = ctx.needs_input_grad[:2]
        qa = b_scale = None
        if gemm is None:
            out = a @ b if bias is None else torch.addmm(bias, a, b)
        else:
            qa, qb = run.quantize(a, gemm.lhs, bsz), run.quantize(b.t(), gemm.rhs, bsz)
            out = run.matmul(qa, qb, block=bsz, dtype=a.dtype, bias=bias, fast=_fast(a.dtype))
            b_scale = qb.scale if recipe.dgrad is not None and recipe.dgrad.rhs == gemm.rhs and gemm.rhs.transposes else None
        # wgrad contracts over M, so it reads a^T: in FP8 it is saved as such, one byte a value. dgrad reads the weight
        # the other way round than forward does. The weight outlives the step anyway: only its scale is saved with it.
        at: Quantized | tuple[Tensor | None, None] = (a, None) if needs_b else (None, None)
        if needs_b and recipe.wgrad is not None:
            cast = recipe.wgrad.lhs
            shared = gemm is not None and gemm.lhs == cast and cast.transposes
            at = _row_major(Quantized(qa.data.t(), qa.scale) if shared and qa is not None else run.quantize(a.t(), cast, -1))
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
        run, recipe, bsz2 = kernels.get(ctx.executor), ctx.recipe, ctx.bsz2
        at, at_scale, b, b_scale, _ = ctx.saved_tensors
        needs_a, needs_b, needs_bias = ctx.needs_input_grad[:3]
        grad_a = grad_b = qg = None
        if needs_a and recipe.dgrad is not None:
            qg, qb = run.quantize(grad, recipe.dgrad.lhs, bsz2), run.quantize(b, recipe.dgrad.rhs, bsz2, b_scale)
            grad_a = run.matmul(qg, qb, block=bsz2, dtype=ctx.dtype, fast=_fast(ctx.dtype))
        elif needs_a:
            grad_a = grad @ b.t()
        if needs_b and recipe.wgrad is not None:
            cast = recipe.wgrad.rhs
            scale = qg.scale if qg is not None and recipe.dgrad.lhs == cast and cast.transposes else None
            # A second cast, which Inductor fuses with the first; it would read the first's result to transpose that.
            qa, qg = Quantized(at, at_scale), _row_major(run.quantize(grad.t(), cast, -1, scale))
            # In the weight's own layout: autograd copies a gradient that has another.
            lhs, rhs = (qg, qa) if ctx.column_major else (qa, qg)
            grad_b = run.matmul(lhs, rhs, block=bsz2, dtype=ctx.dtype)
            grad_b = grad_b.t() if ctx.column_major else grad_b
        elif needs_b:
            grad_b = (grad.t() @ at).t() if ctx.column_major else at.t() @ grad
        return grad_a, grad_b, grad.sum(0) if needs_bias else None


def _at_run_time(condition: torch.SymBool, yes: Callable[..., Tensor], no: Callable[..., Tensor], operands: tuple[Tensor, ...]) -> Tensor:
    """Both branches in the graph, of which the condition on a symbolic size chooses one at run time, if it is not known by now."""
    if guard_or_false(condition):
        return yes(*operands)
    if guard_or_false(torch.sym_not(condition)):
        return no(*operands)
    # Inductor takes branches that return tuples alone.
    chosen: tuple[Tensor] = torch.ops.higher_order.cond(condition, lambda *xs: (yes(*xs),), lambda *xs: (no(*xs),), operands)
    return chosen[0]


class _FrozenMatmulFP8(torch.autograd.Function):
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
        executor: str,
        weight_only: bool,
    ) -> Tensor:
        run, lhs = kernels.get(executor), recipe.forward.lhs if recipe.forward else None

        def exact(a: Tensor, data: Tensor, scale: Tensor, *bias: Tensor) -> Tensor:
            return run.matmul(Quantized(a, None), Quantized(data, scale), block=bsz, dtype=a.dtype, bias=bias[0] if bias else None)

        def quantized(a: Tensor, data: Tensor, scale: Tensor, *bias: Tensor) -> Tensor:
            assert lhs is not None
            qa, qb, addend = run.quantize(a, lhs, bsz), Quantized(data, scale), bias[0] if bias else None
            return run.matmul(qa, qb, block=bsz, dtype=a.dtype, bias=addend, fast=_fast(a.dtype), once=True)

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
            grad_a = _FrozenMatmulFP8._dgrad(ctx, grad) if ctx.needs_input_grad[0] else None
            gradients: tuple[Tensor | None, ...] = grad_a, None, None, grad.sum(0) if ctx.needs_input_grad[3] else None
        if twice:
            gradients = once(gradients, f"matmul_fp8_{ctx.recipe.name}", grad, *ctx.saved_tensors)
        return *gradients, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        no_tangent(f"matmul_fp8_{ctx.recipe.name}")

    @staticmethod
    def _dgrad(ctx: Any, grad: Tensor) -> Tensor:
        (b, b_scale), run, gemm = ctx.saved_tensors, kernels.get(ctx.executor), ctx.recipe.dgrad
        if gemm is None or gemm.rhs != ctx.recipe.forward.rhs or not gemm.rhs.transposes:
            return grad @ dequantize(Quantized(b.t(), b_scale), -1, ctx.dtype)
        qg, scale = run.quantize(grad, gemm.lhs, ctx.bsz2), b_scale if b_scale.dim() == 0 else b_scale[0, 0]  # a scale per tensor
        return run.matmul(qg, Quantized(b, scale), block=ctx.bsz2, dtype=ctx.dtype, fast=_fast(ctx.dtype))


def autocast(x: Any) -> Any:
    """What autocast does to an operand of a linear: any float but float64 becomes its dtype."""
    if x is None or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    kind = x.device.type
    enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # a meta tensor knows no autocast
    return x.to(torch.get_autocast_dtype(kind)) if enabled else x


def _check_frozen(name: str, b: Tensor, b_scale: Tensor | None, recipe: Recipe, weight_only: bool) -> None:
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
        raise DTypeError(f"{name} got b of {b.dtype} with a b_scale; expected b as {cast.format.dtype}, as the recipe quantizes it")
    if b_scale.dtype != torch.float32:
        raise DTypeError(f"{name} got b_scale of {b_scale.dtype}; expected torch.float32")
    if tuple(b_scale.shape) not in expected:
        raise ShapeError(f"{name} got b_scale {tuple(b_scale.shape)}; expected {' or '.join(map(str, expected))} for b {tuple(b.shape)}")
    if b_scale.device != b.device:
        raise DeviceError(f"{name} got b on {b.device} and b_scale on {b_scale.device}; move one with .to")


def _check(name: str, a: Tensor, b: Tensor, bias: Tensor | None, frozen: bool) -> None:
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
            raise DTypeError(f"{name} got {operand} of {x.dtype}; expected float32, float16 or bfloat16 (cast it with .to)")
        elif x.dtype != a.dtype:
            raise DTypeError(f"{name} got a of {a.dtype} and {operand} of {x.dtype}; expected one dtype (cast one with .to)")
        if x.device != a.device:
            raise DeviceError(f"{name} got a on {a.device} and {operand} on {x.device}; move one with .to")


def check_transforms(name: str, *operands: Tensor) -> None:
    """Raises DifferentiationError where torch.func differentiates an operand: the op's gradient is autograd's."""
    if any(map(is_gradtrackingtensor, operands)):
        raise DifferentiationError(
            f"{name} was called inside grad, jvp or another transform of torch.func, which cannot see its gradient; use torch.autograd, or "
            'torch.compile(..., backend="fp8") around the transform, which leaves such linears in high precision'
        )


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
    _check(name, a, b, bias, frozen)
    check_transforms(name, a, b)
    if executor not in EXECUTORS:
        raise unknown("executor", executor, EXECUTORS)
    executor = resolve(executor, a.device)
    if not (forward and dgrad and wgrad):
        recipe = recipe.only(gemm for gemm, wanted in zip(GEMMS, (forward, dgrad, wgrad), strict=True) if wanted)
    _check_frozen(name, b, b_scale, recipe, weight_only)
    if frozen and executor == "bitsandbytes":
        raise ExecutorError(f"{name} got a b_scale; executor 'bitsandbytes' keeps no FP8 weights (use 'scaled_mm' or 'simulated')")
    k, n = b.shape
    if guard_or_false(a.numel() == 0) or n == 0:  # K = 0 included
        out = a @ b.to(a.dtype)
        return out if bias is None else out + bias
    bsz, bsz2 = check_block_size("bsz", bsz, k), check_block_size("bsz2", bsz2, n)
    rows = a.reshape(-1, k)
    product: Tensor
    if b_scale is not None:
        product = _FrozenMatmulFP8.apply(rows, b, b_scale, bias, recipe, bsz, bsz2, executor, weight_only)  # type: ignore[no-untyped-call]
    else:
        # An FP8 a^T has no history: without this empty tensor, which has a's, a second derivative would miss a silently.
        anchored = recipe.wgrad is not None and torch.is_grad_enabled() and rows.requires_grad and b.requires_grad
        anchor = rows[:0].clone() if anchored else None
        product = _MatmulFP8.apply(rows, b, bias, anchor, recipe, bsz, bsz2, executor)  # type: ignore[no-untyped-call]
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
