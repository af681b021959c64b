"""replace: a linear, however it was written -> one FP8 matmul op.

    linear(x, W, bias)                 -> matmul_fp8(x, t(W), bsz, bsz2, bias=bias)
    x @ W                              -> matmul_fp8(x, W, bsz, bsz2)
    addmm(c, x, W, beta=v, alpha=u)    -> y = mul(matmul_fp8(x, W, bsz, bsz2), u); add(y, type_as(c, y), alpha=v)
    grouped_mm(x, W, offs=o)           -> grouped_mm_fp8(x, W, o)
    bmm(x, W)                          -> grouped_mm_fp8(x, W)
    mv(W, x), on a CPU                 -> type_as(matmul_fp8(x, t(W), bsz, bsz2), x)
    W @ x                              -> transpose(matmul_fp8(transpose(x), t(W), bsz, bsz2))
    einsum("bsd,dhk->bshk", x, W)      -> unflatten(matmul_fp8(expand(x, -1, -1, D), flatten(W), bsz, bsz2))

bsz and bsz2 come from K and N of the weight. A 1-D addend with alpha = beta = 1 becomes the op's bias;
beta = 0 drops it. type_as changes something only under autocast, which casts every argument of addmm, and none of mv's
on a CPU. A GEMM that `decide` left in high precision is an argument as well, such as wgrad=False.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fp8fx.graph.values import UNKNOWN, fake, value
from fp8fx.linears.matches import GroupedMatch, LinearMatch, MatmulMatch, ModuleMatch
from fp8fx.linears.views import View
from fp8fx.ops import grouped_mm as grouped
from fp8fx.ops.matmul import op
from fp8fx.pipeline import Rewrite
from fp8fx.recipes.formats import block_size

__all__ = ["CHANGES", "NEEDS", "run"]

NEEDS: tuple[str, ...] = ()
CHANGES = True


aten = torch.ops.aten


def _copy_meta(node: fx.Node, like: fx.Node, result: Any) -> fx.Node:
    """Provenance (module stack, stack trace) from `like`; the value is `result`."""
    node.meta = {key: item for key, item in like.meta.items() if key not in ("val", "example_value", "tensor_meta")}
    if result is not UNKNOWN:
        node.meta["example_value" if "example_value" in like.meta else "val"] = result
    return node


def _call(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: fx.Node, result: Any) -> fx.Node:
    """A call of a function; provenance from `like`, its value is `result`."""
    return _copy_meta(like.graph.call_function(target, args, kwargs), like, result)


def _seen(node: fx.Node, views: Sequence[View], like: fx.Node) -> fx.Node:
    """The node, seen so; provenance from `like`."""
    for name, *arguments in views:
        before = fake(node)
        result = UNKNOWN if before is None else getattr(before, name)(*arguments)
        node = _copy_meta(node.graph.call_method(name, (node, *arguments)), like, result)
    return node


def _attribute(match: ModuleMatch, name: str) -> fx.Node:
    """The weight or the bias of a module that is called."""
    return _copy_meta(match.node.graph.get_attr(f"{match.module}.{name}"), match.node, UNKNOWN)


def _right_operand(match: MatmulMatch | ModuleMatch) -> fx.Node:
    """The weight as (K, N)."""
    weight = _attribute(match, "weight") if isinstance(match, ModuleMatch) else match.weight
    weight = _seen(weight, match.views.weight, match.node)
    if not match.transposed:
        return weight
    w = fake(weight)
    return _call(aten.t.default, (weight,), {}, match.node, UNKNOWN if w is None else w.t())


def _bias(match: MatmulMatch | ModuleMatch) -> fx.Node | None:
    """The addend that the op itself can add, (N,)."""
    if isinstance(match, ModuleMatch):
        return _attribute(match, "bias") if match.has_bias else None
    return match.bias if _fits_the_op(match) else None


def _fits_the_op(match: MatmulMatch) -> bool:
    addend = None if match.bias is None else fake(match.bias)
    is_bias = addend is not None and tuple(addend.shape) == (match.n,) and addend.is_floating_point()
    return is_bias and match.alpha == match.beta == 1


def _value_of_op(match: MatmulMatch | ModuleMatch) -> Any:
    """What the op itself gives, before it is seen otherwise."""
    result = fake(match.node)
    x = match.x
    if not match.views.output or result is None or x is None:
        return value(match.node)
    return result.new_empty((*x.shape[:-1], match.n))


def _call_op(match: MatmulMatch | ModuleMatch, left: fx.Node, rewrite: Rewrite) -> fx.Node:
    """The FP8 op, (*, N)."""
    right = _right_operand(match)
    kwargs: dict[str, Any] = {}
    if (bias := _bias(match)) is not None:
        kwargs["bias"] = bias
    if rewrite.config.executor != "auto":
        kwargs["executor"] = rewrite.config.executor
    if choice := rewrite.choices.get(match.node):
        kwargs |= dict.fromkeys(sorted(choice.speed.keys() - choice.fp8), False)
    args = (left, right, block_size(match.k), block_size(match.n))
    return _call(op(match.own_recipe or rewrite.config.recipe), args, kwargs, match.node, _value_of_op(match))


def _scale_and_add(match: MatmulMatch, product: fx.Node) -> fx.Node:
    """`alpha * product + beta * bias`, as far as the op has not computed it."""
    node = match.node
    if match.alpha != 1:
        product = _call(aten.mul.Tensor, (product, match.alpha), {}, node, value(node))
    if match.bias is None or match.beta == 0 or _fits_the_op(match):
        return product
    beta: dict[str, Any] = {} if match.beta == 1 else {"alpha": match.beta}
    addend = _call(aten.type_as.default, (match.bias, product), {}, node, UNKNOWN)
    return _call(aten.add.Tensor, (product, addend), beta, node, value(node))


def _replace(match: MatmulMatch | ModuleMatch, rewrite: Rewrite) -> fx.Node:
    """Puts the op and what is around it in front of the match's node; returns its result."""
    node = match.node
    left = _seen(match.input, match.views.input, node)
    result = rewrite.ops[node] = _call_op(match, left, rewrite)
    if not match.form.casts_under_autocast and match.tensor.device.type == "cpu":
        result = _call(aten.type_as.default, (result, left), {}, node, value(node))
    if isinstance(match, MatmulMatch):
        result = _scale_and_add(match, result)
    return _seen(result, match.views.output, node)


def _replace_grouped(match: GroupedMatch, rewrite: Rewrite) -> fx.Node:
    """Puts the grouped op in front of the match's node; returns its result."""
    node = match.node
    args = (match.input, match.weight) if match.offs is None else (match.input, match.weight, match.offs)
    kwargs: dict[str, Any] = {} if rewrite.config.executor == "auto" else {"executor": rewrite.config.executor}
    result = rewrite.ops[node] = _call(
        grouped.op(match.own_recipe or rewrite.config.recipe), args, kwargs, node, value(node)
    )
    return result


def _with_operands(match: LinearMatch, replaced: dict[fx.Node, fx.Node]) -> LinearMatch:
    """The match, its input and addend as they are after earlier linears were replaced."""
    match = dataclasses.replace(match, input=replaced.get(match.input, match.input))
    if isinstance(match, MatmulMatch) and match.bias is not None:
        match = dataclasses.replace(match, bias=replaced.get(match.bias, match.bias))
    return match


def run(rewrite: Rewrite) -> int:
    """Rewrites every match left; returns how many."""
    replaced: dict[fx.Node, fx.Node] = {}
    graph = rewrite.gm.graph
    for match in rewrite.matches:
        node = match.node
        match = _with_operands(match, replaced)
        with graph.inserting_before(node):
            if isinstance(match, GroupedMatch):
                result = _replace_grouped(match, rewrite)
            else:
                assert isinstance(match, MatmulMatch | ModuleMatch)
                result = _replace(match, rewrite)
        node.replace_all_uses_with(result)
        graph.erase_node(node)
        replaced[node] = result
    return len(rewrite.matches)
