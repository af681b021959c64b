"""replace: a linear, however it was written -> one FP8 matmul op.

    linear(x, W, bias)                 -> matmul_fp8(x, t(W), bsz, bsz2, bias=bias)
    x @ W                              -> matmul_fp8(x, W, bsz, bsz2)
    addmm(c, x, W, beta=v, alpha=u)    -> y = mul(matmul_fp8(x, W, bsz, bsz2), u); add(y, type_as(c, y), alpha=v)
    grouped_mm(x, W, offs=o)           -> grouped_mm_fp8(x, W, o)
    bmm(x, W)                          -> grouped_mm_fp8(x, W)
    mv(W, x), on a CPU                 -> type_as(matmul_fp8(x, t(W), bsz, bsz2), x)
    W @ x                              -> transpose(matmul_fp8(transpose(x), t(W), bsz, bsz2))
    einsum("bsd,dhk->bshk", x, W)      -> unflatten(matmul_fp8(expand(x, -1, -1, D), flatten(W), bsz, bsz2))

bsz and bsz2 come from K and N of the weight. A 1-D addend with alpha = beta = 1 becomes the op's bias; beta = 0 drops it.
Only under autocast, which casts every argument of addmm and on a CPU none of mv, does type_as change anything. A GEMM that `decide` left
in high precision is an argument too, as wgrad=False.
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


def _seen(node: fx.Node, views: Sequence[View], like: fx.Node) -> fx.Node:
    """The node, seen so; provenance from `like`."""
    for name, *arguments in views:
        known = fake(node)
        result = UNKNOWN if known is None else getattr(known, name)(*arguments)
        node = _copy_meta(node.graph.call_method(name, (node, *arguments)), like, result)
    return node


def _right_operand(match: MatmulMatch | ModuleMatch, rewrite: Rewrite) -> fx.Node:
    """The weight as (K, N)."""
    graph = rewrite.gm.graph
    if isinstance(match, ModuleMatch):
        weight = graph.get_attr(f"{match.module}.weight")
        _copy_meta(weight, match.node, UNKNOWN)
    else:
        weight = match.weight
    weight = _seen(weight, match.views.weight, match.node)
    if not match.transposed:
        return weight
    known = fake(weight)
    return _copy_meta(
        graph.call_function(aten.t.default, (weight,)), match.node, UNKNOWN if known is None else known.t()
    )


def _bias(match: MatmulMatch | ModuleMatch, rewrite: Rewrite) -> tuple[fx.Node | None, bool]:
    """The addend, and whether the op itself can add it."""
    if isinstance(match, ModuleMatch):
        if not match.has_bias:
            return None, True
        bias = rewrite.gm.graph.get_attr(f"{match.module}.bias")
        return _copy_meta(bias, match.node, UNKNOWN), True
    if match.bias is None or match.beta == 0:
        return None, True
    known = fake(match.bias)
    fits = known is not None and tuple(known.shape) == (match.n,) and known.is_floating_point()
    return match.bias, fits and match.alpha == match.beta == 1


def _result(match: LinearMatch) -> Any:
    """What the op itself gives, before it is seen otherwise."""
    known, x = fake(match.node), match.x
    if not match.views.output or known is None or x is None:
        return value(match.node)
    return known.new_empty((*x.shape[:-1], match.n))


def _replace_grouped(match: GroupedMatch, rewrite: Rewrite) -> fx.Node:
    graph, node, config = rewrite.gm.graph, match.node, rewrite.config
    kwargs: dict[str, Any] = {} if config.executor == "auto" else {"executor": config.executor}
    operands = (match.input, match.weight, *([] if match.offs is None else [match.offs]))
    with graph.inserting_before(node):
        new = _copy_meta(graph.call_function(grouped.op(config.recipe), operands, kwargs), node, value(node))
    rewrite.ops[node] = new
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return new


def _replace(match: MatmulMatch | ModuleMatch, rewrite: Rewrite) -> fx.Node:
    graph, node, config = rewrite.gm.graph, match.node, rewrite.config
    with graph.inserting_before(node):
        left = _seen(match.input, match.views.input, node)
        right = _right_operand(match, rewrite)
        bias, fused = _bias(match, rewrite)
        kwargs: dict[str, Any] = {}
        if bias is not None and fused:
            kwargs["bias"] = bias
        if config.executor != "auto":
            kwargs["executor"] = config.executor
        if choice := rewrite.choices.get(node):
            kwargs |= dict.fromkeys(sorted(choice.speed.keys() - choice.fp8), False)
        sizes = block_size(match.k), block_size(match.n)
        new = _copy_meta(graph.call_function(op(config.recipe), (left, right, *sizes), kwargs), node, _result(match))
        rewrite.ops[match.node] = new
        if not match.form.casts_under_autocast and match.tensor.device.type == "cpu":
            new = _copy_meta(graph.call_function(aten.type_as.default, (new, left)), node, value(node))
        if isinstance(match, MatmulMatch) and match.alpha != 1:
            new = _copy_meta(graph.call_function(aten.mul.Tensor, (new, match.alpha)), node, value(node))
        if bias is not None and not fused:
            beta = match.beta if isinstance(match, MatmulMatch) else 1
            scaled: dict[str, Any] = {} if beta == 1 else {"alpha": beta}
            bias = _copy_meta(graph.call_function(aten.type_as.default, (bias, new)), node, UNKNOWN)
            new = _copy_meta(graph.call_function(aten.add.Tensor, (new, bias), scaled), node, value(node))
        new = _seen(new, match.views.output, node)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return new


def run(rewrite: Rewrite) -> int:
    """Rewrites every match left; returns how many."""
    now: dict[fx.Node, fx.Node] = {}  # in a chain, a match's operand may be a linear that is gone by its turn
    for match in rewrite.matches:
        current = dataclasses.replace(match, input=now.get(match.input, match.input))
        if isinstance(current, MatmulMatch) and current.bias is not None:
            current = dataclasses.replace(current, bias=now.get(current.bias, current.bias))
        if isinstance(current, GroupedMatch):
            now[match.node] = _replace_grouped(current, rewrite)
        elif isinstance(current, MatmulMatch | ModuleMatch):
            now[match.node] = _replace(current, rewrite)
    return len(rewrite.matches)
