"""decide: a match that the user does not want, or that FP8 would make slower -> a Refusal. The graph stays as it is.

Of a match that stays, `choices` says which GEMMs are worth FP8: forward, dgrad, wgrad. If its weight is to be frozen,
it also says how a single row is best multiplied. Siblings that `merge` makes one GEMM are weighed as that one, and
chosen or left together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from torch import fx

from fp8fx.config import Config
from fp8fx.graph.values import traced_size
from fp8fx.linears.filters import why_filtered
from fp8fx.linears.matches import GroupedMatch, LinearMatch
from fp8fx.linears.routers import is_router
from fp8fx.pipeline import Rewrite
from fp8fx.profit.weighing import Weighing
from fp8fx.reasons import Because, OptionReason, Remark, WeightReason, WorthReason
from fp8fx.recipes.recipe import RECIPES
from fp8fx.weights.freezable import can_freeze
from fp8fx.weights.siblings import MAX_AMAX_RATIO, SiblingGroup, find_siblings
from fp8fx.weights.strides import columns_to_copy

__all__ = ["CHANGES", "NEEDS", "run", "why_unwanted"]

NEEDS: tuple[str, ...] = ("constants", "tensors", "writes")
CHANGES = False


def why_unwanted(match: LinearMatch, config: Config) -> Because | None:
    """Why the user does not want the match; None if they do."""
    if config.profit == "never":
        return OptionReason.NEVER()
    if (reason := why_filtered(match.path, match.name, match.k, match.n, config)) is not None:
        return reason
    if not config.routers and is_router(match):
        return WorthReason.ROUTER()
    return None


def _name_routers(rewrite: Rewrite) -> None:
    """Says of the linears whose weight is computed which are routers: that is why a weight is cast to float32."""
    if rewrite.config.routers:
        return
    for i, refusal in enumerate(rewrite.refusals):
        if refusal.reason.kind is WeightReason.COMPUTED and is_router(refusal):
            rewrite.refusals[i] = replace(refusal, reason=WorthReason.ROUTER_COMPUTED())


def _why_apart(group: SiblingGroup, rewrite: Rewrite, weighing: Weighing) -> Because | None:
    """Why siblings do not become one GEMM; None if they do."""
    recipe, store = RECIPES[group.own_recipe or rewrite.config.recipe], rewrite.store
    if not group.share_a_scale(recipe):
        return Remark.APART_BY_AMAX(ratio=MAX_AMAX_RATIO)
    # As another graph of the model has it, of more rows or fewer: no weight is frozen twice.
    are_one = group.are_frozen_as_one(recipe, store)
    if are_one is not None:
        return None if are_one else Remark.APART_ELSEWHERE()
    writes = rewrite.facts.writes
    is_worth_it = weighing.should_merge(group.matches, lambda matches: columns_to_copy(matches, writes))
    return None if is_worth_it else Remark.APART_BY_COPIES()


def _pair(candidates: Sequence[LinearMatch], rewrite: Rewrite, weighing: Weighing) -> None:
    """Fills `siblings`, and says of the others why they stay apart."""
    for group in find_siblings(candidates, rewrite.facts):
        reason = _why_apart(group, rewrite, weighing)
        if reason is None:
            rewrite.siblings.append(group.matches)
            continue
        for match in group.matches:
            rewrite.remark(match.node, reason)


def run(rewrite: Rewrite) -> int:
    """Moves what is not wanted or not worth it from `matches` to `refusals`, and fills `choices` and `siblings`.

    Returns how many it moved.
    """
    config = rewrite.config
    matches, rewrite.matches = rewrite.matches, []
    weighing = Weighing(config, rewrite.times, frozenset(rewrite.seen))
    frozen: set[fx.Node] = {match.node for match in matches if match.own_recipe is not None}
    if config.freeze:
        frozen |= {match.node for match in matches if can_freeze(match, rewrite.facts)}
    _name_routers(rewrite)
    reasons = {
        match.node: why_unwanted(match, config) or weighing.why_experts_stay(match, match.node in frozen)
        for match in matches
    }
    wanted = [match for match in matches if match.node in frozen and reasons[match.node] is None]
    _pair([match for match in wanted if not isinstance(match, GroupedMatch)], rewrite, weighing)
    readers = Counter(match.input for match in matches)
    groups = {match.node: group for group in rewrite.siblings for match in group}
    for match in matches:
        reason = reasons[match.node]
        if reason is None:
            group = groups.get(match.node, [match])
            choice = weighing.choose(group, readers[match.input], match.node in frozen)
            if choice.fp8:
                rewrite.matches.append(match)
                rewrite.choices[match.node] = choice
                continue
            reason = choice.why_left(traced_size(match.m))
        rewrite.refuse(match, reason)
    return len(matches) - len(rewrite.matches)
