"""Frozen linears that read the same input and can become one GEMM over their weights side by side.

`decide` weighs them as that one GEMM, and `merge` makes it. What else reads the input does not matter. A per-tensor
scale becomes that of all the weights together. This costs nothing while their amaxes are within a factor of 64: a value
keeps all its bits down to 2^-13 of the amax, and few weights lie below 2^-7 of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fp8fx.graph.constants import expression
from fp8fx.graph.facts import Facts
from fp8fx.graph.mutations import Writes
from fp8fx.graph.values import attribute, fake
from fp8fx.linears.matches import LinearMatch, MatmulMatch, ModuleMatch
from fp8fx.linears.views import apply
from fp8fx.ops.fp8_weight import FP8Weight
from fp8fx.recipes.recipe import Recipe
from fp8fx.weights.frozen_tensor import view_key
from fp8fx.weights.side_by_side import lie_with_others
from fp8fx.weights.store import Store

__all__ = ["MAX_AMAX_RATIO", "SiblingGroup", "find_siblings"]

MAX_AMAX_RATIO = 64.0
"""Of the largest amax of weights that share a scale to the smallest."""


@dataclass(frozen=True)
class _WeightRead:
    """What a linear reads: a parameter, and the nodes from there to the weight."""

    match: LinearMatch
    source: Tensor
    node: fx.Node | None
    steps: Sequence[fx.Node]

    @classmethod
    def of(cls, match: LinearMatch, facts: Facts) -> _WeightRead | None:
        """None unless one parameter is behind the weight."""
        if not isinstance(match, MatmulMatch):
            return cls(match, match.tensor, None, ())
        origin = expression(match.weight, facts.constants)
        if origin is None or len(origin[0]) != 1:
            return None
        (node,), steps = origin
        source = facts.tensors.get(node)
        return None if source is None else cls(match, source, node, steps)

    @property
    def can_lie_beside_others(self) -> bool:
        """Whether it is the whole of a weight that is FP8 already, or of one that is quantized as it is read."""
        if self.match.own_recipe is None:
            return True
        is_whole = isinstance(self.source, FP8Weight) and self.source.shape == (self.match.n, self.match.k)
        return is_whole and len(self.steps) == (0 if self.match.transposed else 1) and not self.match.views.weight

    @property
    def key(self) -> Any:
        """Equal for linears that read the same part of the same parameter."""
        if (part := view_key(self._operand, (self.source.shape, self.source.dtype))) is not None:
            return id(self.source), part
        steps = ((str(node.target), repr(fx.map_arg((node.args, node.kwargs), lambda _: None))) for node in self.steps)
        return id(self.source), self.match.transposed, repr(self.match.views.weight), *steps

    def _operand(self, x: Tensor) -> Tensor:
        """The right operand, (K, N)."""
        weight = apply(self.part(x), self.match.views.weight)
        return weight.mT if self.match.transposed else weight

    def part(self, x: Tensor) -> Tensor:
        """What the linear reads of the parameter's value."""
        values = {self.node: x}
        result = x
        for node in self.steps:
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            call: Any = getattr(Tensor, str(node.target)) if node.op == "call_method" else node.target
            result = values[node] = call(*args, **kwargs)
        return result


@dataclass(frozen=True)
class SiblingGroup:
    """Two linears and more that one GEMM can compute, in the graph's order."""

    reads: Sequence[_WeightRead]

    @property
    def matches(self) -> list[LinearMatch]:
        """The linears."""
        return [read.match for read in self.reads]

    @property
    def own_recipe(self) -> str | None:
        """That of weights that are FP8 already."""
        return self.reads[0].match.own_recipe

    def share_a_scale(self, recipe: Recipe, store: Store) -> bool:
        """Whether one scale serves all the weights, if the recipe has one a tensor."""
        forward = recipe.forward
        if self.own_recipe is not None or forward is None or forward.rhs.granularity != "tensor":
            return True  # each output channel has its own
        amaxes = [store.amax(read.source, read.key, read.part) for read in self.reads]
        return max(amaxes) <= MAX_AMAX_RATIO * min(amaxes)

    def are_frozen_as_one(self, recipe: Recipe, store: Store) -> bool | None:
        """Whether another graph has frozen these weights as one, by the same recipe.

        None if none has frozen any of them.
        """
        sources = [read.source for read in self.reads]
        if self.own_recipe is not None:
            return False if lie_with_others([x for x in sources if isinstance(x, FP8Weight)]) else None
        columns = sum(read.match.n for read in self.reads)
        entries = [entry for entry in store.entries(sources) if entry.frozen.gemm == recipe.forward]
        if not entries:
            return None
        # They may all be parts of one parameter, which is frozen as one and in parts.
        ids = set(map(id, sources))
        return any(
            len(entry.buffers[0]) == columns and {id(reference()) for reference in entry.sources} == ids
            for entry in entries
        )


def _is_trained(bias: Tensor) -> bool:
    return bias.requires_grad and torch.is_grad_enabled()


def _bias_lasts(match: LinearMatch, facts: Facts) -> bool:
    """Whether a bias that the op adds is the same in every call, and not trained.

    True of another addend, which is added afterwards.
    """
    if isinstance(match, ModuleMatch):
        if not match.has_bias:
            return True
        own = attribute(facts.gm, f"{match.module}.bias")
        return facts.writes.leave([own]) and not _is_trained(own)
    if not isinstance(match, MatmulMatch) or match.bias is None or (match.alpha, match.beta) != (1, 1):
        return True
    addend = fake(match.bias)
    if addend is None or tuple(addend.shape) != (match.n,):
        return True
    bias = facts.tensors.get(match.bias) if match.bias in facts.constants else None
    return bias is not None and facts.writes.leave([match.bias]) and not _is_trained(bias)


def _versions(graph: fx.Graph, inputs: dict[fx.Node, fx.Node], writes: Writes) -> dict[fx.Node, tuple[int, int]]:
    """Of each linear's node, what tells whether another that reads the same input node reads the same values.

    The input may be changed in place between them, or they may run in another mode.
    """
    mode = 0
    versions = {}
    for node in graph.nodes:
        if not node.op.startswith("call_"):
            continue
        if node in inputs:
            versions[node] = mode, writes.count(inputs[node], node)
        name = getattr(node.target, "__name__", "")
        mode += not node.users or name.startswith(("_enter_", "_exit_"))  # autocast, grad mode
    return versions


def find_siblings(matches: Sequence[LinearMatch], facts: Facts) -> list[SiblingGroup]:
    """The groups that one GEMM can compute, of linears whose weights will be frozen."""
    versions = _versions(facts.gm.graph, {match.node: match.input for match in matches}, facts.writes)
    reads = [read for match in matches if (read := _WeightRead.of(match, facts)) is not None]
    readers = Counter(read.key for read in reads)
    groups: dict[Any, list[_WeightRead]] = {}
    for read in reads:
        match = read.match
        # A weight that another linear reads too would be frozen twice.
        if readers[read.key] == 1 and _bias_lasts(match, facts) and read.can_lie_beside_others:
            source = read.source.dtype, read.source.device, match.own_recipe
            key = match.input, repr(match.views.input), versions[match.node], *source
            groups.setdefault(key, []).append(read)
    return [SiblingGroup(group) for group in groups.values() if len(group) > 1]
