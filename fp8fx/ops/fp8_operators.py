"""What torch's operators do with an FP8 tensor.

A product of matrices arrives here as `mm`, `addmm`, `bmm` or `_grouped_mm`, however it was written. If it contracts K,
it is the FP8 matmul of the weight's recipe; if backward contracts N, that recipe's dgrad. Views and copies
give other FP8 tensors. Everything else reads the dequantized values. What it writes is quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from fp8fx.errors import FreezeError
from fp8fx.executors.registry import resolve
from fp8fx.executors.scaled_mm import ALIGNMENT
from fp8fx.ops import frozen_matmul, register
from fp8fx.ops.fp8_tensor import FP8Tensor
from fp8fx.ops.operands import DTYPES
from fp8fx.recipes.formats import block_size
from fp8fx.recipes.quantize import Quantized
from fp8fx.recipes.recipe import RECIPES
from fp8fx.torch_internals import (
    FakeTensorMode,
    OpOverload,
    decompose,
    dispatch_modes,
    is_in_backward,
    pytree,
    return_and_correct_aliasing,
    schema_of,
)

__all__ = ["dispatch"]

aten = torch.ops.aten


# What reads a weight as a linear does.


def _operand(b: Any) -> FP8Tensor | None:
    """The right operand of a product that sums over K, as linears do; None if it is no FP8 weight, or sums over N."""
    return b if isinstance(b, FP8Tensor) and b.contracts_k else None


def _product(a: Tensor, b: FP8Tensor, bias: Tensor | None = None) -> Tensor:
    """a (M, K) @ b (K, N) + bias (N,), by the op of the weight's recipe.

    If nothing traces, it is what that op computes. To dispatch the op takes longer than the GEMM, and autograd stands
    above already.
    """
    fits = a.dim() == 2 and a.shape[1] == b.shape[0] and a.device == b.device
    if dispatch_modes() or not fits or 0 in a.shape or 0 in b.shape:
        product: Tensor = register.overload("matmul", b.recipe)(a, b, bias=bias)
        return product
    data, scale = b.as_operand()
    block, executor = block_size(b.shape[0]), resolve("auto", b.device)
    return frozen_matmul.product(a, Quantized(data.t(), scale), bias, RECIPES[b.recipe], block, executor)


def _mm(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    a, b = args
    if isinstance(a, FP8Tensor) or a.dtype != b.dtype or a.dtype not in DTYPES:
        return NotImplemented
    if (operand := _operand(b)) is not None:
        return _product(a, operand)
    if is_in_backward() and b.is_k(-1):
        executor = resolve("auto", b.device)
        return frozen_matmul.dgrad(a, b.t().as_operand(), RECIPES[b.recipe], block_size(b.shape[0]), executor, a.dtype)
    return NotImplemented


def _addmm(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    bias, a, b = args
    if any(factor != 1 for factor in kwargs.values()) or isinstance(a, FP8Tensor) or isinstance(bias, FP8Tensor):
        return NotImplemented
    operand = _operand(b)
    if operand is None or a.dtype != b.dtype or a.dtype not in DTYPES:
        return NotImplemented
    if bias.dim() == 1 and bias.shape[0] == b.shape[1] and bias.dtype == a.dtype:
        return _product(a, operand, bias)
    return _product(a, operand) + bias


def _bmm(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    a, b = args
    operand = _operand(b)
    if operand is None or isinstance(a, FP8Tensor) or a.dtype != b.dtype or a.dtype not in DTYPES:
        return NotImplemented
    if b.shape[0] == 1 or b.qdata.stride(0) == 0:  # one weight for all
        weight = b[0]
        return _product(a.reshape(-1, a.shape[-1]), weight).view(*a.shape[:2], b.shape[2])
    if a.dtype != torch.bfloat16 or any(size % ALIGNMENT for size in b.shape[1:]):
        return NotImplemented
    return register.overload("grouped_mm", b.recipe)(a, b)


def _grouped_mm(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    a, b = args[:2]
    offs = args[2] if len(args) > 2 else kwargs.get("offs")
    operand = _operand(b)
    if operand is None or isinstance(a, FP8Tensor) or b.dim() != 3 or any(size % ALIGNMENT for size in b.shape[1:]):
        return NotImplemented
    others = [*args[3:], *(x for name, x in kwargs.items() if name != "offs")]  # bias, out_dtype
    if a.dtype != torch.bfloat16 or any(x is not None and x is not torch.bfloat16 for x in others):
        return NotImplemented
    return register.overload("grouped_mm", b.recipe)(a, b, offs)


def _embedding(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    weight, indices = args[:2]
    if not isinstance(weight, FP8Tensor):
        return NotImplemented
    rows = func(weight.qdata.view(torch.uint8), indices).view(weight.qdata.dtype)
    scale = weight.scale.expand(weight.shape[0], weight.scale.shape[1])
    return (rows.float() * func(scale, indices)).to(weight.dtype)


# What makes another weight of a weight.


def _is_view(func: OpOverload) -> bool:
    """Whether the operator gives views of its first argument."""
    first = schema_of(func).arguments[0].alias_info if schema_of(func).arguments else None
    return first is not None and not first.is_write and func is not aten.view.dtype


def _view(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    weight, *rest = args
    if not isinstance(weight, FP8Tensor):
        return NotImplemented
    data = func(weight.qdata, *rest, **kwargs)
    try:
        scale = func(weight.scale.expand(weight.qdata.shape), *rest, **kwargs)
    except RuntimeError as error:
        raise FreezeError(
            f"{func} of an FP8 weight {tuple(weight.shape)} cannot be a view of its data and its scale; "
            "weight.dequantize() is a copy in high precision"
        ) from error
    if isinstance(data, Tensor):
        return return_and_correct_aliasing(func, args, kwargs, _viewed(weight, data, scale))
    return type(data)(_viewed(weight, *parts) for parts in zip(data, scale, strict=True))


def _viewed(weight: FP8Tensor, data: Tensor, scale: Tensor) -> FP8Tensor:
    for dim, (size, stride) in enumerate(zip(scale.shape, scale.stride(), strict=True)):
        if size > 1 and stride == 0:
            scale = scale.narrow(dim, 0, 1)
    is_part = weight.is_part or data.numel() != weight.numel()
    return type(weight).of(data, scale, weight.recipe, weight.dtype, is_part)


def _t(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    weight = args[0]  # as `_view`, in less time: each product begins with it
    return return_and_correct_aliasing(func, args, kwargs, weight.like(func(weight.qdata), func(weight.scale)))


def _detach(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    # The same data and scale, not views of them: what moves these in memory moves them for both weights.
    weight = args[0]
    return return_and_correct_aliasing(func, args, kwargs, weight.like(weight.qdata, weight.scale))


def _clone(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    weight = args[0]
    return type(weight).of(func(weight.qdata), func(weight.scale), weight.recipe, weight.dtype)


def _to_copy(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    weight = args[0]
    dtype = kwargs.get("dtype") or weight.dtype
    if dtype not in (*DTYPES, torch.float64):
        return NotImplemented
    moves = {name: x for name, x in kwargs.items() if name not in ("dtype", "memory_format")}
    return type(weight).of(func(weight.qdata, **moves), func(weight.scale, **moves), weight.recipe, dtype)


def _empty_like(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    weight = args[0]
    if (kwargs.get("dtype") or weight.dtype) != weight.dtype:
        return NotImplemented
    return _to_copy(func, args, kwargs)


# What writes to a weight.


def _copy_(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    weight, value = args[:2]
    if not isinstance(weight, FP8Tensor):
        return NotImplemented
    weight.write(value)
    return weight


def _refuse_memory(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> NoReturn:
    raise FreezeError(
        f"{func} of an FP8 weight, which has no memory of its dtype; weight.dequantize() is a copy in high precision"
    )


_VIEWS: Mapping[OpOverload, Callable[..., Any]] = {
    aten.t.default: _t,
    aten.detach.default: _detach,
    aten.alias.default: _detach,
}


_HANDLERS: Mapping[OpOverload, Callable[..., Any]] = {
    aten.mm.default: _mm,
    aten.addmm.default: _addmm,
    aten.bmm.default: _bmm,
    aten._grouped_mm.default: _grouped_mm,
    aten.embedding.default: _embedding,
    aten.clone.default: _clone,
    aten._to_copy.default: _to_copy,
    aten.empty_like.default: _empty_like,
    aten.copy_.default: _copy_,
    aten.set_.source_Tensor: _refuse_memory,
    aten.resize_.default: _refuse_memory,
    aten.as_strided.default: _refuse_memory,
    aten.view.dtype: _refuse_memory,
}


_PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten._grouped_mm.default}


def _is_only_faked() -> bool:
    """Whether operators are called for shapes alone: on fake tensors, and nothing else sees them."""
    modes = dispatch_modes()
    return len(modes) == 1 and isinstance(modes[0], FakeTensorMode)


def _shape_of_product(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What Dynamo sees of a product: the shape and dtype of the result, as of weights in high precision."""

    def unquantized(weight: FP8Tensor) -> Tensor:
        return torch.empty_like(weight.qdata, dtype=weight.dtype)

    args, kwargs = pytree.tree_map_only(FP8Tensor, unquantized, (args, kwargs))
    return func(*args, **kwargs)


def _written(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """The arguments that the operator writes to."""
    for i, argument in enumerate(schema_of(func).arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from pytree.tree_leaves(args[i] if i < len(args) else kwargs.get(argument.name))


def _in_high_precision(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Runs the operator on the dequantized values; what it writes is quantized."""
    values: dict[int, tuple[FP8Tensor, Tensor]] = {}

    def value_of(weight: FP8Tensor) -> Tensor:
        return values.setdefault(id(weight), (weight, weight.dequantize()))[1]

    exact_args, exact_kwargs = pytree.tree_map_only(FP8Tensor, value_of, (args, kwargs))
    result = func(*exact_args, **exact_kwargs)
    written = {id(x): x for x in _written(func, args, kwargs) if isinstance(x, FP8Tensor)}
    originals = {}
    for key, weight in written.items():
        value = values[key][1]
        weight.write(value)
        originals[id(value)] = weight
    return pytree.tree_map_only(Tensor, lambda x: originals.get(id(x), x), result)


def dispatch(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What the operator gives of arguments among which are FP8 tensors."""
    with torch.no_grad():  # autograd stands above
        if func in _PRODUCTS and _is_only_faked():
            return _shape_of_product(func, args, kwargs)
        result = NotImplemented
        if (handler := _HANDLERS.get(func)) is not None:
            result = handler(func, args, kwargs)
        elif func in _VIEWS or _is_view(func):
            # In inference mode too, a view of a tensor that was made outside is none of inference mode.
            with torch.inference_mode(args[0].is_inference()):
                view: Callable[..., Any] = _VIEWS.get(func, _view)
                result = view(func, args, kwargs)
        if result is NotImplemented:
            result = decompose(func, args, kwargs)
        if result is NotImplemented:
            result = _in_high_precision(func, args, kwargs)
    return result
