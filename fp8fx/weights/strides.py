"""Whether a graph can read a tensor of other strides in a node's place, such as a part of a wider result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from fp8fx.graph.mutations import Writes
from fp8fx.graph.operators import called
from fp8fx.graph.values import UNKNOWN, fake, storage, value
from fp8fx.linears.matches import LinearMatch
from fp8fx.linears.views import apply
from fp8fx.linears.weight_operand import is_called_view
from fp8fx.torch_internals import HigherOrderOperator, pytree

__all__ = ["columns_to_copy", "takes_strides_of"]

_READ_MEMORY = {
    "as_strided",
    "as_strided_",
    "stride",
    "is_contiguous",
    "storage_offset",
    "data_ptr",
    "untyped_storage",
    "storage",
}
"""What tells of a tensor how it lies in memory."""


def columns_to_copy(group: Sequence[LinearMatch], writes: Writes) -> int:
    """How many columns of the result of one GEMM, which computes these linears, have to be copied.

    What reads them asks for other strides.
    """
    first = group[0]
    total = sum(match.n for match in group)
    result, x = fake(first.node), first.x
    if result is None or x is None:
        return total
    wide = result.new_empty((*x.shape[:-1], total))
    start = count = 0
    for match in group:
        part = apply(wide.narrow(-1, start, match.n), match.views.output)
        count += 0 if takes_strides_of(part, match.node, writes) else match.n
        start += match.n
    return count


def takes_strides_of(x: Tensor, node: fx.Node, writes: Writes) -> bool:
    """Whether what the graph does with `node`'s value it can do with `x`, which has its shape and other strides."""
    own = value(node)
    own = own.detach() if isinstance(own, Tensor) else own  # what changes its shape in place changes this one's
    return _users_take(x, node, own, writes.first(node) is not None)


def _replay(node: fx.Node, args: Any, kwargs: Any) -> Any:
    call: Any = node.target
    return getattr(args[0], call)(*args[1:], **kwargs) if node.op == "call_method" else call(*args, **kwargs)


def _storages(values: Any) -> set[int | None]:
    return {storage(x) for x in pytree.tree_leaves(values) if isinstance(x, Tensor)}


def _aliases(values: Any, others: Any) -> bool:
    """Whether a tensor among `values` and one among `others` share memory."""
    return not (_storages(values) - {None}).isdisjoint(_storages(others))


def _users_take(x: Any, node: fx.Node, own: Any, is_written: bool) -> bool:
    """Whether all users of `node` can read `x`.

    `own` is what the graph has in the place of `x`, which it changes in place if it `is_written`.
    """
    for user in node.users:
        if user.op not in ("call_function", "call_method") or isinstance(user.target, HigherOrderOperator):
            return False  # the output, or code that is not seen here
        if called(user) in _READ_MEMORY:
            return False
        values = {operand: value(operand) for operand in user.all_input_nodes}
        given = fx.map_arg((user.args, user.kwargs), {**values, node: x}.__getitem__)
        exact = fx.map_arg((user.args, user.kwargs), {**values, node: own}.__getitem__)
        if any(leaf is UNKNOWN for leaf in pytree.tree_leaves(given)):
            if is_called_view(user):
                return False
            continue
        try:
            result = _replay(user, *given)
            if not isinstance(result, (Tensor, tuple, list)):
                continue
            is_alias = _aliases(result, x)
            exact_result = _replay(user, *exact) if is_written else None
        except Exception:
            return False
        # A view of a contiguous tensor, such as `reshape` gives, may be a copy of this one. A write to either would not
        # be seen in the other.
        if is_written and not is_alias and _aliases(exact_result, own):
            return False
        if is_alias and not _users_take(result, user, exact_result, is_written):
            return False
    return True
