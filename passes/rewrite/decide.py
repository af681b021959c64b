"""decide: a match that the user does not want, or that FP8 would make slower -> a Refusal. The graph stays as it is.

Of a match that stays, `choices` says which GEMMs are worth FP8 (forward, dgrad, wgrad) and, where its weight is to be frozen, how a
single row is best multiplied. Siblings that `merge` makes one GEMM are weighed as that, and chosen or left
together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import fx

from fp8fx.config import Config
from fp8fx.executors.registry import resolve
from fp8fx.graph.constants import expression
from fp8fx.graph.mutations import Writes
from fp8fx.graph.operators import called
from fp8fx.graph.values import fake, traced_size
from fp8fx.linears.matches import GroupedMatch, LinearMatch, MatmulMatch, Refusal
from fp8fx.linears.weights import is_view
from fp8fx.ops import grouped_mm as grouped
from fp8fx.pipeline import Rewrite
from fp8fx.profit.choice import Choice, choose, possible, should_merge
from fp8fx.profit.model import Linear
from fp8fx.reasons import WeightReason
from fp8fx.recipes.recipe import GEMMS, RECIPES
from fp8fx.torch_internals import HigherOrderOperator
from fp8fx.weights.siblings import copied, find, held

__all__ = ["CHANGES", "NEEDS", "run", "should_rewrite"]

NEEDS: tuple[str, ...] = ("constants", "tensors", "writes")
CHANGES = False


def _named(match: LinearMatch, patterns: tuple[str, ...]) -> str | None:
    """The first pattern that the match's module path or weight name fits."""
    return next((p for p in patterns if fnmatchcase(match.path, p) or fnmatchcase(match.name, p)), None)


def _routes(match: LinearMatch | Refusal) -> bool:
    """Whether the topk of what the linear gives is taken, softmax and the like in between; of no vocabulary, which is wider than K."""
    pending, seen, count = [match.node], {match.node}, fake(match.node)
    if not isinstance(match.n, int) or not isinstance(match.k, int) or match.n >= match.k or count is None:
        return False
    while pending:
        for user in pending.pop().users:
            if called(user) == "topk":
                return True
            known = fake(user)
            if (
                known is not None
                and user not in seen
                and traced_size(known.numel()) == traced_size(count.numel()) is not None
            ):
                seen.add(user)
                pending.append(user)
    return False


def _on_tensor_cores(match: LinearMatch, config: Config) -> bool:
    device = match.tensor.device
    groups = isinstance(match, GroupedMatch)
    return device.type != "meta" and resolve(config.executor, device, groups=groups).tensor_cores


def should_rewrite(match: LinearMatch, config: Config) -> str | None:
    """Why the user does not want the match; None if they do."""
    if config.profit == "never":
        return "profit='never'"
    if pattern := _named(match, config.exclude):
        return f"excluded by {pattern!r}"
    if _named(match, config.include) is None:
        return f"not among include={', '.join(map(repr, config.include))}"
    if min(match.k, match.n) < config.min_features:
        return f"K={match.k}, N={match.n}: below min_features={config.min_features}"
    if not config.routers and _routes(match):
        return "a router: topk chooses by it; routers=True rewrites it too"
    return None


def _name_routers(rewrite: Rewrite) -> None:
    """Says of the linears whose weight is computed which are routers: of a weight cast to float32, that is why."""
    for i, refusal in enumerate(rewrite.refusals):
        if refusal.reason == WeightReason.COMPUTED() and not rewrite.config.routers and _routes(refusal):
            rewrite.refusals[i] = replace(
                refusal, reason="a router: topk chooses by it; and its weight is computed, as by a cast to float32"
            )


def _gemms(match: LinearMatch) -> tuple[str, ...]:
    """The GEMMs that will run: gradients only where autograd will ask for them."""
    x, recording = fake(match.input), torch.is_grad_enabled()
    wanted = (True, recording and (x is None or x.requires_grad), recording and match.tensor.requires_grad)
    return tuple(name for name, needed in zip(GEMMS, wanted, strict=True) if needed)


def _fused(nodes: Iterable[fx.Node], opaque: Set[fx.Node], follow: Callable[[fx.Node], Iterable[fx.Node]]) -> bool:
    """Whether all of these are pointwise work or reductions, which a cast joins; looks through views to what they `follow`."""
    for node in nodes:
        if is_view(node) and _fused(follow(node), opaque, follow):
            continue
        if is_view(node) or node.op not in ("call_function", "call_method") or node in opaque:
            return False
        if called(node) == "scaled_dot_product_attention" or isinstance(node.target, HigherOrderOperator):
            return False
    return True


def _frozen(match: LinearMatch, rewrite: Rewrite, weights: set[fx.Node], writes: Writes | None) -> bool:
    """Whether the weight will be frozen: its value is known here, and the graph does not change it."""
    if writes is None:
        return False
    if not isinstance(match, MatmulMatch | GroupedMatch):
        return writes.leave([match.tensor])
    found = expression(match.weight, weights)
    if found is None or not writes.leave((*found[0], *found[1])):
        return False
    return all(node in rewrite.facts.tensors for node in found[0])


def _grouped_choice(match: LinearMatch, config: Config, frozen: bool) -> Choice:
    """Whether the forward GEMM of a weight for each of several experts is worth it; predicted, as no such GEMM is measured here."""
    m, recipe = traced_size(match.m), RECIPES[config.recipe]
    if config.profit == "always" or m is None or not _on_tensor_cores(match, config):
        return Choice(possible(grouped.GEMMS, recipe, frozen))
    linear = Linear(m, match.k, match.n, torch.bfloat16, grouped.GEMMS, frozen=frozen, experts=match.tensor.shape[0])
    return choose(linear, recipe)


def _dtype(match: LinearMatch) -> torch.dtype:
    """What it is computed in: autocast's."""
    result = fake(match.node)
    return match.tensor.dtype if result is None else result.dtype


def _should_merge(group: Sequence[LinearMatch], rewrite: Rewrite) -> bool:
    """Whether frozen siblings are worth being one GEMM; where no tensor cores run or M is not known there is nothing to weigh."""
    first, m, widths = group[0], traced_size(group[0].m), [match.n for match in group]
    if m is None or not _on_tensor_cores(first, rewrite.config):
        return True
    linear = Linear(m, first.k, sum(widths), _dtype(first), ("forward",), frozen=True)
    recipe, times = RECIPES[rewrite.config.recipe], rewrite.times(first.tensor.device)
    return should_merge(linear, widths, copied(group, rewrite.facts.writes), recipe, times)


def _choice(
    group: Sequence[LinearMatch], readers: int, matmuls: Set[fx.Node], rewrite: Rewrite, frozen: bool
) -> Choice:
    """Which GEMMs of a linear, or of siblings that are one, are worth it; all of them where no tensor cores run or M is not known, so
    that there is nothing to weigh."""
    match, config = group[0], rewrite.config
    device, m, recipe, gemms = match.tensor.device, traced_size(match.m), RECIPES[config.recipe], _gemms(match)
    always = config.profit == "always" or m is None
    if isinstance(match, GroupedMatch):
        return _grouped_choice(match, config, frozen)
    if not _on_tensor_cores(match, config) or (always and not frozen):
        return Choice(possible(gemms, recipe, frozen))
    linear = Linear(
        m or 0,
        match.k,
        sum(one.n for one in group),
        _dtype(match),
        gemms,
        1 if frozen else readers,
        input_fused=_fused([match.input], matmuls, lambda view: view.all_input_nodes),
        grad_fused=all(_fused(one.node.users, matmuls, lambda view: view.users) for one in group),
        frozen=frozen,
        dynamic=not isinstance(match.m, int),
    )
    return choose(linear, recipe, rewrite.times(device), always)


def _quantizes_experts(match: LinearMatch, config: Config, frozen: bool) -> str | None:
    """Why the weights of several experts stay as they are: few rows read each, and to quantize them takes longer than all the GEMMs."""
    device = match.tensor.device
    if (
        not isinstance(match, GroupedMatch)
        or config.profit == "always"
        or device.type == "meta"
        or not resolve(config.executor, device).tensor_cores
    ):
        return None
    if not _on_tensor_cores(match, config):
        return "FP8 is not worth it: tensor cores multiply groups in FP8 on compute capability 9.0 alone"
    if frozen:
        return None
    advice = "" if config.freeze else "; freeze=True quantizes them once"
    return f"FP8 is not worth it: the weights of all experts would be quantized in every call{advice}"


def run(rewrite: Rewrite) -> int:
    """Moves what is not wanted or not worth it from `matches` to `refusals` and fills `choices`; returns how many it moved."""
    _name_routers(rewrite)
    matches, rewrite.matches = rewrite.matches, []
    weights, writes = set[fx.Node](), None
    if rewrite.config.freeze:
        weights, writes = rewrite.facts.constants, rewrite.facts.writes
    frozen = {match.node: _frozen(match, rewrite, weights, writes) for match in matches}
    readers, matmuls = Counter(match.input for match in matches), set(rewrite.seen)
    reasons = {
        match.node: should_rewrite(match, rewrite.config)
        or _quantizes_experts(match, rewrite.config, frozen[match.node])
        for match in matches
    }
    if writes is not None:
        wanted = [
            match
            for match in matches
            if frozen[match.node] and reasons[match.node] is None and not isinstance(match, GroupedMatch)
        ]
        for group in find(rewrite, wanted):
            as_one = held(
                group, rewrite
            )  # as another graph of the model has it, of more rows or fewer: no weight is held twice
            if _should_merge(group, rewrite) if as_one is None else as_one:
                rewrite.siblings.append(group)
                continue
            why = (
                "copies of their results would take longer" if as_one is None else "another graph has frozen them apart"
            )
            for match in group:
                rewrite.remarks.setdefault(match.node, []).append(f"not merged with its siblings: {why}")
    groups = {match.node: group for group in rewrite.siblings for match in group}
    for match in matches:
        if (reason := reasons[match.node]) is None:
            group = groups.get(match.node, [match])
            choice = _choice(group, readers[match.input], matmuls, rewrite, frozen[match.node])
            if choice.fp8:
                rewrite.matches.append(match)
                rewrite.choices[match.node] = choice
                continue
            reason = f"{choice.remark} at M={traced_size(match.m)}"
        rewrite.refuse(match, reason)
    return len(matches) - len(rewrite.matches)
