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

from fp8fx.graph.facts import Facts
from fp8fx.graph.mutations import Writes
from fp8fx.graph.values import attribute, fake
from fp8fx.linears.matches import LinearMatch, MatmulMatch, ModuleMatch
from fp8fx.ops.fp8_weight import FP8Weight
from fp8fx.recipes.recipe import Recipe
from fp8fx.weights.side_by_side import lie_with_others
from fp8fx.weights.store import Store
from fp8fx.weights.weight_read import WeightRead

__all__ = ["MAX_AMAX_RATIO", "SiblingGroup", "find_siblings"]

MAX_AMAX_RATIO = 64.0
"""Of the largest amax of weights that share a scale to the smallest."""


@dataclass(frozen=True)
class SiblingGroup:
    """Two linears and more that one GEMM can compute, in the graph's order."""

    reads: Sequence[WeightRead]

    @property
    def matches(self) -> list[LinearMatch]:
        """The linears."""
        return [read.match for read in self.reads]

    @property
    def own_recipe(self) -> str | None:
        """That of weights that are FP8 already."""
        return self.reads[0].match.own_recipe

    def share_a_scale(self, recipe: Recipe) -> bool:
        """Whether one scale serves all the weights, if the recipe has one a tensor."""
        forward = recipe.forward
        if self.own_recipe is not None or forward is None or forward.rhs.granularity != "tensor":
            return True  # each output channel has its own
        amaxes = [read.amax for read in self.reads]
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
    reads = [read for match in matches if (read := WeightRead.of(match, facts)) is not None]
    readers = Counter(read.key for read in reads)
    groups: dict[Any, list[WeightRead]] = {}
    for read in reads:
        match = read.match
        # A weight that another linear reads too would be frozen twice.
        if readers[read.key] == 1 and _bias_lasts(match, facts) and read.can_lie_beside_others:
            source = read.source.dtype, read.source.device, match.own_recipe
            key = match.input, repr(match.views.input), versions[match.node], *source
            groups.setdefault(key, []).append(read)
    return [SiblingGroup(group) for group in groups.values() if len(group) > 1]
