"""merge: frozen linears that read the same input -> one GEMM over their weights side by side, and views of its result.

    q = matmul_fp8(x, t(Q)); k = matmul_fp8(x, t(K), bias=c)
    ->
    qk = matmul_fp8(x, cat([t(Q), t(K)], 1), bias=cat([zeros, c])); q = narrow(qk, -1, 0, N_q); k = narrow(qk, -1, N_q, N_k)

What else reads x does not matter. A per-tensor scale becomes that of all the weights together, which costs nothing while their amaxes are
within a factor of 64: a value keeps all its bits down to 2^-13 of the amax, and few weights lie below 2^-7 of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from fp8fx.config import RECIPES
from fp8fx.formats import block_size
from fp8fx.forms import is_called_view
from fp8fx.frozen import STORE
from fp8fx.graph import UNKNOWN, constants, expression, fake, real, value
from fp8fx.match import LinearMatch
from fp8fx.rewrite import Rewrite
from fp8fx.writes import Writes

__all__ = ["MODIFIES", "run"]

MODIFIES = True

_RATIO = 64.0  # of the largest amax to the smallest, at most

aten = torch.ops.aten


def _weight(op: fx.Node, rewrite: Rewrite, known: set[fx.Node], writes: Writes) -> Tensor | None:
    """The parameter behind the op's weight; None unless its value is known here, and no other in the next call."""
    found = expression(op.args[1], known) if isinstance(op.args[1], fx.Node) else None
    if found is None or len(found[0]) != 1 or not writes.leave((*found[0], *found[1])):
        return None
    return real(rewrite.gm, rewrite.example_inputs, found[0][0])


def _versions(gm: fx.GraphModule, ops: Set[fx.Node], writes: Writes) -> dict[fx.Node, Any]:
    """Of each op, what tells whether another that reads the same node reads the same values: changed in place, or in another mode."""
    mode, found = 0, {}
    for node in gm.graph.nodes:
        if not node.op.startswith("call_"):
            continue
        if node in ops:
            found[node] = mode, writes.count(node.args[0], node)
        mode += not node.users or getattr(node.target, "__name__", "").startswith(("_enter_", "_exit_"))  # autocast, grad mode
    return found


def _input(op: fx.Node) -> Any:
    """Equal for ops that read the same input: an einsum's is a view of its own each."""
    x = op.args[0]
    assert isinstance(x, fx.Node)
    return x.args if x.op == "call_method" and x.target == "expand" and not x.kwargs else x


def _groups(rewrite: Rewrite, known: set[fx.Node]) -> list[list[fx.Node]]:
    """Siblings that one GEMM can compute."""
    found: dict[Any, dict[fx.Node, Tensor]] = {}
    ops = {rewrite.ops[match.node]: None for match in rewrite.matches if not match.grouped}
    writes = Writes(rewrite.gm, rewrite.example_inputs)
    versions = _versions(rewrite.gm, set(ops), writes)
    weights = {op: _weight(op, rewrite, known, writes) for op in ops}
    readers = Counter(_reading(op, weights[op], known) for op in ops)
    for op in ops:
        weight, bias = weights[op], op.kwargs.get("bias")
        lasts = bias is None or (isinstance(bias, fx.Node) and bias in known and writes.leave([bias]))
        # A weight that another op reads too would be held twice.
        if weight is not None and lasts and readers[_reading(op, weight, known)] == 1:
            same = sorted((name, x) for name, x in op.kwargs.items() if name != "bias")
            found.setdefault((_input(op), versions[op], weight.dtype, weight.device, *same), {})[op] = weight
    return [list(weights) for weights in found.values() if len(weights) > 1 and _one_scale_serves(weights, rewrite, known)]


def _reading(op: fx.Node, weight: Tensor | None, known: set[fx.Node]) -> Any:
    """Equal for ops that read the same part of the same weight."""
    found = expression(op.args[1], known) if isinstance(op.args[1], fx.Node) else None
    steps = () if found is None else found[1]
    return id(weight), *((str(node.target), repr(fx.map_arg((node.args, node.kwargs), lambda _: None))) for node in steps)


def _part(op: fx.Node, known: set[fx.Node]) -> Callable[[Tensor], Tensor]:
    """What the op reads of its weight's parameter."""
    found = expression(op.args[1], known) if isinstance(op.args[1], fx.Node) else None
    assert found is not None

    def part(x: Tensor) -> Tensor:
        (source,), values = found[0], {found[0][0]: x}
        for node in found[1]:
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            call: Any = getattr(Tensor, str(node.target)) if node.op == "call_method" else node.target
            values[node] = call(*args, **kwargs)
        return values[found[1][-1] if found[1] else source]

    return part


def _one_scale_serves(weights: Mapping[fx.Node, Tensor], rewrite: Rewrite, known: set[fx.Node]) -> bool:
    forward = RECIPES[rewrite.config.recipe].forward
    if forward is None or forward.rhs.granularity != "tensor":
        return True  # each output channel has its own
    amaxes = [STORE.amax(x, _reading(op, x, known), _part(op, known)) for op, x in weights.items()]
    if max(amaxes) <= _RATIO * min(amaxes):
        return True
    for op in weights:
        rewrite.remark(op, f"not merged with its siblings: their weights' amaxes differ by more than {_RATIO:.0f}x")
    return False


def _hoist(node: fx.Node, before: fx.Node, known: set[fx.Node]) -> None:
    """Moves what `node` is computed of, constants alone, in front of `before`."""
    found = expression(node, known)
    assert found is not None
    for one in (*found[0], *found[1]):
        if one.op != "placeholder" and before < one:
            before.prepend(one)


_LAYOUT = {"as_strided", "as_strided_", "stride", "is_contiguous", "storage_offset", "data_ptr", "untyped_storage", "storage"}


def _suits(node: fx.Node, x: Tensor) -> bool:
    """Whether what the graph does with `node`'s value it can do with `x`, which has its shape and other strides."""
    for user in node.users:
        if user.op not in ("call_function", "call_method") or isinstance(user.target, torch._ops.HigherOrderOperator):
            return False  # the output, or code that is not seen here
        if getattr(user.target, "__name__", str(user.target)).split(".")[0] in _LAYOUT:
            return False
        args, kwargs = fx.map_arg((user.args, user.kwargs), lambda n: x if n is node else value(n))
        if any(found is UNKNOWN for found in tree_leaves((args, kwargs))):
            if is_called_view(user):
                return False
            continue
        try:
            result = getattr(args[0], str(user.target))(*args[1:], **kwargs) if user.op == "call_method" else user.target(*args, **kwargs)  # type: ignore[operator]
        except Exception:
            return False
        if isinstance(result, Tensor) and result._is_view() and not _suits(user, result):
            return False
    return True


def _bias(ops: Sequence[fx.Node], widths: Sequence[int], graph: fx.Graph) -> fx.Node | None:
    """The ops' biases side by side, zeros for an op without one."""
    biases = [op.kwargs.get("bias") for op in ops]
    some = next((bias for bias in biases if bias is not None), None)
    if some is None:
        return None
    addends = [graph.call_method("new_zeros", (some, (n,))) if bias is None else bias for bias, n in zip(biases, widths, strict=True)]
    return graph.call_function(aten.cat.default, (addends,))


def _merge(ops: Sequence[fx.Node], widths: Sequence[int], known: set[fx.Node]) -> fx.Node:
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
            part = graph.call_method("narrow", (merged, -1, start, n))  # a view of its own each, which may be changed in place
            if wide is None or not _suits(op, wide.narrow(-1, start, n)):
                part = graph.call_method("contiguous", (part,))
            part.meta, start = {**op.meta}, start + n
            op.replace_all_uses_with(part)
    if wide is not None:
        merged.meta["example_value" if "example_value" in merged.meta else "val"] = wide
    for op in ops:
        graph.erase_node(op)
    return merged


def run(rewrite: Rewrite) -> int:
    """Merges every group of siblings; returns how many linears that touched."""
    if not rewrite.config.freeze:
        return 0
    known = constants(rewrite.gm, rewrite.example_inputs)
    matches: dict[fx.Node, LinearMatch] = {rewrite.ops[match.node]: match for match in rewrite.matches}
    count = 0
    for ops in _groups(rewrite, known):
        names = [matches[op].name for op in ops]
        merged = _merge(ops, [matches[op].n for op in ops], known)
        for op, name in zip(ops, names, strict=True):
            rewrite.ops[matches[op].node] = merged
            rewrite.remarks.setdefault(matches[op].node, []).append(f"one GEMM with {', '.join(other for other in names if other != name)}")
        count += len(ops)
    return count
