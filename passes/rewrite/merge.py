"""merge: frozen linears that read the same input -> one GEMM over their weights side by side, and views of its result.

    q = matmul_fp8(x, t(Q)); k = matmul_fp8(x, t(K), bias=c)
    ->
    qk = matmul_fp8(x, cat([t(Q), t(K)], 1), bias=cat([zeros, c])); q = narrow(qk, -1, 0, N_q); k = narrow(qk, -1, N_q, N_k)

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
from fp8fx.linears.weights import is_called_view
from fp8fx.pipeline import Rewrite
from fp8fx.recipes.formats import block_size
from fp8fx.weights.siblings import suits

__all__ = ["CHANGES", "NEEDS", "run"]

NEEDS: tuple[str, ...] = ("constants", "writes")
CHANGES = True


aten = torch.ops.aten


def _hoist(node: fx.Node, before: fx.Node, known: set[fx.Node]) -> None:
    """Moves what `node` is computed of, constants alone, in front of `before`."""
    found = expression(node, known)
    assert found is not None
    for one in (*found[0], *found[1]):
        if one.op != "placeholder" and before < one:
            before.prepend(one)


def _bias(ops: Sequence[fx.Node], widths: Sequence[int], graph: fx.Graph) -> fx.Node | None:
    """The ops' biases side by side, zeros for an op without one."""
    biases = [op.kwargs.get("bias") for op in ops]
    some = next((bias for bias in biases if bias is not None), None)
    if some is None:
        return None
    addends = [
        graph.call_method("new_zeros", (some, (n,))) if bias is None else bias
        for bias, n in zip(biases, widths, strict=True)
    ]
    return graph.call_function(aten.cat.default, (addends,))


def _merge(ops: Sequence[fx.Node], widths: Sequence[int], known: set[fx.Node], writes: Writes) -> fx.Node:
    """Puts the one op in place of `ops`, whose N are `widths`."""
    first, graph, total = ops[0], ops[0].graph, sum(widths)
    for op in ops:
        for operand in (op.args[1], op.kwargs.get("bias")):
            if isinstance(operand, fx.Node):
                _hoist(operand, first, known)
    known_result = fake(first)
    wide = None if known_result is None else known_result.new_empty((*known_result.shape[:-1], total))
    kwargs: dict[str, Any] = {name: x for name, x in first.kwargs.items() if name != "bias"}
    with graph.inserting_before(first):
        weight = graph.call_function(aten.cat.default, ([op.args[1] for op in ops], 1))
        if (bias := _bias(ops, widths, graph)) is not None:
            kwargs["bias"] = bias
        merged = graph.call_function(first.target, (first.args[0], weight, first.args[2], block_size(total)), kwargs)  # type: ignore[arg-type]
        merged.meta, start = {**first.meta}, 0
        for op, n in zip(ops, widths, strict=True):
            part = graph.call_method(
                "narrow", (merged, -1, start, n)
            )  # a view of its own each, which may be changed in place
            if wide is None or not suits(op, wide.narrow(-1, start, n), writes):
                part = graph.call_method(
                    "clone", (part,), {"memory_format": torch.contiguous_format}
                )  # of one row, too
            part.meta, start = {**op.meta}, start + n
            op.replace_all_uses_with(part)
    if wide is not None:
        merged.meta["example_value" if "example_value" in merged.meta else "val"] = wide
    for op in ops:
        seen = op.args[0]
        graph.erase_node(op)
        while (
            isinstance(seen, fx.Node) and not seen.users and is_called_view(seen)
        ):  # its own view of the input, perhaps a copy
            left = seen
            seen = left.args[0]
            graph.erase_node(left)
    return merged


def run(rewrite: Rewrite) -> int:
    """Merges every group of siblings; returns how many linears that touched."""
    if not rewrite.siblings:
        return 0
    known, writes = rewrite.facts.constants, rewrite.facts.writes
    count = 0
    for group in rewrite.siblings:
        ops = [rewrite.ops[match.node] for match in group if match.node in rewrite.ops]
        if not ops:  # in high precision, all of them
            continue
        merged = _merge(ops, [match.n for match in group], known, writes)
        for match in group:
            rewrite.ops[match.node] = merged
            others = ", ".join(other.name for other in group if other is not match)
            rewrite.remarks.setdefault(match.node, []).append(f"one GEMM with {others}")
        count += len(group)
    return count
