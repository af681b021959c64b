"""merge: frozen linears that read the same input -> one GEMM over their weights side by side, and views of its result.

    q = matmul_fp8(x, t(Q)); k = matmul_fp8(x, t(K), bias=c)
    ->
    qk = matmul_fp8(x, cat([t(Q), t(K)], 1), bias=cat([zeros, c]))
    q = narrow(qk, -1, 0, N_q); k = narrow(qk, -1, N_q, N_k)

`decide` says which: it weighs siblings as the one GEMM that they become.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fp8fx.graph.constants import expression
from fp8fx.graph.mutations import Writes
from fp8fx.graph.values import fake
from fp8fx.linears.weight_operand import is_called_view
from fp8fx.pipeline import Rewrite
from fp8fx.reasons import Remark
from fp8fx.recipes.formats import block_size
from fp8fx.weights.strides import takes_strides_of

__all__ = ["CHANGES", "NEEDS", "run"]

NEEDS: tuple[str, ...] = ("constants", "writes")
CHANGES = True


aten = torch.ops.aten


def _hoist(node: fx.Node, before: fx.Node, constants: set[fx.Node]) -> None:
    """Moves what `node` is computed of, constants alone, in front of `before`."""
    origin = expression(node, constants)
    assert origin is not None
    sources, steps = origin
    for part in (*sources, *steps):
        if part.op != "placeholder" and before < part:
            before.prepend(part)


def _bias(ops: Sequence[fx.Node], widths: Sequence[int], graph: fx.Graph) -> fx.Node | None:
    """The ops' biases side by side, zeros for an op without one."""
    biases = [op.kwargs.get("bias") for op in ops]
    given = next((bias for bias in biases if bias is not None), None)
    if given is None:
        return None
    addends = [
        graph.call_method("new_zeros", (given, (n,))) if bias is None else bias
        for bias, n in zip(biases, widths, strict=True)
    ]
    return graph.call_function(aten.cat.default, (addends,))


def _erase_own_views(node: object, graph: fx.Graph) -> None:
    """Erases a linear's own view of its input, perhaps a copy, and what it is a view of, if nothing else reads them."""
    while isinstance(node, fx.Node) and not node.users and is_called_view(node):
        view = node
        node = view.args[0]
        graph.erase_node(view)


def _merge(ops: Sequence[fx.Node], widths: Sequence[int], constants: set[fx.Node], writes: Writes) -> fx.Node:
    """Puts the one op in place of `ops`, whose N are `widths`."""
    first = ops[0]
    graph = first.graph
    total = sum(widths)
    for op in ops:
        for operand in (op.args[1], op.kwargs.get("bias")):
            if isinstance(operand, fx.Node):
                _hoist(operand, first, constants)
    result = fake(first)
    wide = None if result is None else result.new_empty((*result.shape[:-1], total))
    kwargs: dict[str, Any] = {name: x for name, x in first.kwargs.items() if name != "bias"}
    with graph.inserting_before(first):
        weight = graph.call_function(aten.cat.default, ([op.args[1] for op in ops], 1))
        if (bias := _bias(ops, widths, graph)) is not None:
            kwargs["bias"] = bias
        operands: Any = (first.args[0], weight, first.args[2], block_size(total))
        target: Any = first.target
        merged = graph.call_function(target, operands, kwargs)
        merged.meta = {**first.meta}
        start = 0
        for op, n in zip(ops, widths, strict=True):
            # A view of its own each, which may be changed in place.
            part = graph.call_method("narrow", (merged, -1, start, n))
            if wide is None or not takes_strides_of(wide.narrow(-1, start, n), op, writes):
                # Of one row, too: `contiguous` would not copy it.
                part = graph.call_method("clone", (part,), {"memory_format": torch.contiguous_format})
            part.meta = {**op.meta}
            op.replace_all_uses_with(part)
            start += n
    if wide is not None:
        merged.meta["example_value" if "example_value" in merged.meta else "val"] = wide
    for op in ops:
        seen = op.args[0]
        graph.erase_node(op)
        _erase_own_views(seen, graph)
    return merged


def run(rewrite: Rewrite) -> int:
    """Merges every group of siblings; returns how many linears that touched."""
    count = 0
    for group in rewrite.siblings:
        ops = [rewrite.ops[match.node] for match in group if match.node in rewrite.ops]
        if not ops:  # in high precision, all of them
            continue
        widths = [match.n for match in group]
        merged = _merge(ops, widths, rewrite.facts.constants, rewrite.facts.writes)
        for match in group:
            rewrite.ops[match.node] = merged
            others = ", ".join(other.name for other in group if other is not match)
            rewrite.remark(match.node, Remark.ONE_GEMM(siblings=others))
        count += len(group)
    return count
