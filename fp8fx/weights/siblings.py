"""Frozen linears that read the same input and can become one GEMM over their weights side by side.

`decide` weighs them as that one GEMM, and `merge` makes it. What else reads the input does not matter. A per-tensor scale becomes that of
all the weights together, which costs nothing while their amaxes are within a factor of 64: a value keeps all its bits down to 2^-13 of the
amax, and few weights lie below 2^-7 of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fp8fx.graph.constants import expression
from fp8fx.graph.mutations import Writes
from fp8fx.graph.operators import called
from fp8fx.graph.values import UNKNOWN, attribute, fake, storage, value
from fp8fx.linears.matches import LinearMatch, MatmulMatch, ModuleMatch
from fp8fx.linears.views import apply
from fp8fx.linears.weights import is_called_view
from fp8fx.pipeline import Rewrite
from fp8fx.recipes.recipe import RECIPES
from fp8fx.torch_internals import HigherOrderOperator, pytree
from fp8fx.weights.frozen import view_key

__all__ = ["copied", "find", "held", "suits"]

_RATIO = 64.0  # of the largest amax to the smallest, at most


@dataclass(frozen=True)
class _Reading:
    """What a linear reads: a parameter, and the nodes from there to the weight."""

    match: LinearMatch
    source: Tensor
    node: fx.Node | None
    steps: Sequence[fx.Node]

    @property
    def key(self) -> Any:
        """Equal for linears that read the same part of the same parameter."""
        if (part := view_key(self._operand, (self.source.shape, self.source.dtype))) is not None:
            return id(self.source), part
        steps = ((str(node.target), repr(fx.map_arg((node.args, node.kwargs), lambda _: None))) for node in self.steps)
        return id(self.source), self.match.transposed, repr(self.match.views.weight), *steps

    def _operand(self, x: Tensor) -> Tensor:
        """The right operand, (K, N)."""
        seen = apply(self.part(x), self.match.views.weight)
        return seen.mT if self.match.transposed else seen

    def part(self, x: Tensor) -> Tensor:
        """What the linear reads of the parameter's value."""
        values, result = {self.node: x}, x
        for node in self.steps:
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            call: Any = getattr(Tensor, str(node.target)) if node.op == "call_method" else node.target
            values[node] = result = call(*args, **kwargs)
        return result


def _reading(match: LinearMatch, rewrite: Rewrite, known: set[fx.Node]) -> _Reading | None:
    """None unless one parameter is behind the weight."""
    if not isinstance(match, MatmulMatch):
        return _Reading(match, match.tensor, None, ())
    found = expression(match.weight, known)
    source = None if found is None or len(found[0]) != 1 else rewrite.facts.tensors.get(found[0][0])
    return None if found is None or source is None else _Reading(match, source, found[0][0], found[1])


def _bias_lasts(match: LinearMatch, rewrite: Rewrite, known: set[fx.Node], writes: Writes) -> bool:
    """Whether a bias that the op adds is the same in every call, and not trained; another addend is added afterwards."""
    if isinstance(match, ModuleMatch):
        if not match.has_bias:
            return True
        bias = attribute(rewrite.gm, f"{match.module}.bias")
        return writes.leave([bias]) and not (bias.requires_grad and torch.is_grad_enabled())
    if not isinstance(match, MatmulMatch) or match.bias is None or (match.alpha, match.beta) != (1, 1):
        return True
    addend = fake(match.bias)
    if addend is None or tuple(addend.shape) != (match.n,):
        return True
    found = rewrite.facts.tensors.get(match.bias) if match.bias in known else None
    return found is not None and writes.leave([match.bias]) and not (found.requires_grad and torch.is_grad_enabled())


def _versions(gm: fx.GraphModule, inputs: dict[fx.Node, fx.Node], writes: Writes) -> dict[fx.Node, Any]:
    """Of each linear, what tells whether another that reads the same node reads the same values: changed in place, or in another mode."""
    mode, found = 0, {}
    for node in gm.graph.nodes:
        if not node.op.startswith("call_"):
            continue
        if node in inputs:
            found[node] = mode, writes.count(inputs[node], node)
        mode += not node.users or getattr(node.target, "__name__", "").startswith(
            ("_enter_", "_exit_")
        )  # autocast, grad mode
    return found


def _one_scale_serves(group: Iterable[_Reading], rewrite: Rewrite) -> bool:
    forward = RECIPES[rewrite.config.recipe].forward
    if forward is None or forward.rhs.granularity != "tensor":
        return True  # each output channel has its own
    amaxes = [rewrite.store.amax(one.source, one.key, one.part) for one in group]
    return max(amaxes) <= _RATIO * min(amaxes)


def find(rewrite: Rewrite, matches: Sequence[LinearMatch]) -> list[list[LinearMatch]]:
    """Of linears whose weights will be frozen, the groups of two and more that one GEMM can compute, in the graph's order."""
    known, writes = rewrite.facts.constants, rewrite.facts.writes
    versions = _versions(rewrite.gm, {match.node: match.input for match in matches}, writes)
    readings = [one for match in matches if (one := _reading(match, rewrite, known)) is not None]
    readers, found = Counter(one.key for one in readings), dict[Any, list[_Reading]]()
    for one in readings:
        match = one.match
        # A weight that another linear reads too would be held twice.
        if readers[one.key] == 1 and _bias_lasts(match, rewrite, known, writes):
            key = match.input, repr(match.views.input), versions[match.node], one.source.dtype, one.source.device
            found.setdefault(key, []).append(one)
    groups = []
    for group in (group for group in found.values() if len(group) > 1):
        if _one_scale_serves(group, rewrite):
            groups.append([one.match for one in group])
            continue
        for one in group:
            reason = f"not merged with its siblings: their weights' amaxes differ by more than {_RATIO:.0f}x"
            rewrite.remarks.setdefault(one.match.node, []).append(reason)
    return groups


def held(group: Sequence[LinearMatch], rewrite: Rewrite) -> bool | None:
    """Whether another graph has frozen these weights as one, by the same recipe; None where none has frozen any of them."""
    sources = [one.source for match in group if (one := _reading(match, rewrite, rewrite.facts.constants)) is not None]
    gemm, total = RECIPES[rewrite.config.recipe].forward, sum(match.n for match in group)
    weights = [entry for entry in rewrite.store.entries(sources) if entry.frozen.gemm == gemm]
    # They may all be parts of one parameter, which is frozen as one and in parts.
    same = [
        len(entry.buffers[0]) == total and {id(x()) for x in entry.sources} == set(map(id, sources))
        for entry in weights
    ]
    return any(same) if same else None


def copied(group: Sequence[LinearMatch], writes: Writes) -> int:
    """How many columns of the one GEMM's result have to be copied, since what reads them asks for other strides."""
    first, start, count = group[0], 0, 0
    known, x, total = fake(first.node), first.x, sum(match.n for match in group)
    if known is None or x is None:
        return total
    wide = known.new_empty((*x.shape[:-1], total))
    for match in group:
        part = apply(wide.narrow(-1, start, match.n), match.views.output)
        start, count = start + match.n, count + (0 if suits(match.node, part, writes) else match.n)
    return count


_LAYOUT = {
    "as_strided",
    "as_strided_",
    "stride",
    "is_contiguous",
    "storage_offset",
    "data_ptr",
    "untyped_storage",
    "storage",
}


def _replay(node: fx.Node, args: Any, kwargs: Any) -> Any:
    call: Any = node.target
    return getattr(args[0], call)(*args[1:], **kwargs) if node.op == "call_method" else call(*args, **kwargs)


def _aliases(found: Any, x: Any) -> bool:
    """Whether tensors in `found` and in `x` share memory."""
    ours, theirs = ({storage(t) for t in pytree.tree_leaves(held) if isinstance(t, Tensor)} for held in (found, x))
    return not (ours - {None}).isdisjoint(theirs)


def suits(node: fx.Node, x: Tensor, writes: Writes) -> bool:
    """Whether what the graph does with `node`'s value it can do with `x`, which has its shape and other strides."""
    own = value(node)
    own = own.detach() if isinstance(own, Tensor) else own  # what changes its shape in place changes this one's
    return _suits(node, x, own, writes.first(node) is not None)


def _suits(node: fx.Node, x: Any, own: Any, written: bool) -> bool:
    """`own` is what the graph has in the place of `x`, which it changes in place if `written`."""
    for user in node.users:
        if user.op not in ("call_function", "call_method") or isinstance(user.target, HigherOrderOperator):
            return False  # the output, or code that is not seen here
        if called(user) in _LAYOUT:
            return False
        known = {n: value(n) for n in user.all_input_nodes}
        given, exact = (fx.map_arg((user.args, user.kwargs), {**known, node: of}.__getitem__) for of in (x, own))
        if any(found is UNKNOWN for found in pytree.tree_leaves(given)):
            if is_called_view(user):
                return False
            continue
        try:
            result = _replay(user, *given)
            if not isinstance(result, (Tensor, tuple, list)):
                continue
            aliases, exactly = _aliases(result, x), _replay(user, *exact) if written else None
        except Exception:
            return False
        # What is a view of a contiguous tensor, as by `reshape`, may be a copy of this one, and a write to either would not be seen.
        if (written and not aliases and _aliases(exactly, own)) or (
            aliases and not _suits(user, result, exactly, written)
        ):
            return False
    return True
