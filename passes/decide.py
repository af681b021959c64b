"""decide: a match that the user's filters leave out, or that FP8 would make slower -> a Refusal. The graph stays as it is.

Of a match that stays, `choices` says which GEMMs are worth FP8: forward, dgrad, wgrad.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Set
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fp8fx.config import GEMMS, RECIPES, Config
from fp8fx.graph import fake, hint
from fp8fx.hardware import resolve
from fp8fx.match import LinearMatch, is_view
from fp8fx.profit import Choice, Linear, choose
from fp8fx.rewrite import Rewrite

__all__ = ["MODIFIES", "run", "should_rewrite"]

MODIFIES = False

_ATTENTION: tuple[Callable[..., Any], ...] = (F.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default)


def _named(match: LinearMatch, patterns: tuple[str, ...]) -> str | None:
    """The first pattern that the match's module path or weight name fits."""
    return next((p for p in patterns if fnmatchcase(match.path, p) or fnmatchcase(match.name, p)), None)


def should_rewrite(match: LinearMatch, config: Config) -> str | None:
    """Why the user does not want the match; None if they do."""
    if pattern := _named(match, config.exclude):
        return f"excluded by {pattern!r}"
    if _named(match, config.include) is None:
        return f"not among include={', '.join(map(repr, config.include))}"
    if min(match.k, match.n) < config.min_features:
        return f"K={match.k}, N={match.n}: below min_features={config.min_features}"
    return None


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
        if is_view(node) or node.op not in ("call_function", "call_method") or node in opaque or node.target in _ATTENTION:
            return False
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return False
    return True


def _choice(match: LinearMatch, siblings: int, matmuls: Set[fx.Node], config: Config) -> Choice:
    """Which GEMMs are worth it; all of them where no tensor cores run or M is not known, so that there is nothing to weigh."""
    device, m, recipe, gemms = match.tensor.device, hint(match.m), RECIPES[config.recipe], _gemms(match)
    if config.profit == "always" or m is None or device.type == "meta" or resolve(config.executor, device) != "scaled_mm":
        return Choice(tuple(name for name in recipe.gemms if name in gemms))
    result = fake(match.node)
    linear = Linear(
        m,
        match.k,
        match.n,
        match.tensor.dtype if result is None else result.dtype,  # autocast's
        gemms,
        siblings,
        input_fused=_fused([match.input], matmuls, lambda view: view.all_input_nodes),
        grad_fused=_fused(match.node.users, matmuls, lambda view: view.users),
    )
    return choose(linear, recipe)


def run(rewrite: Rewrite) -> int:
    """Moves what is not wanted or not worth it from `matches` to `refusals` and fills `choices`; returns how many it moved."""
    matches, rewrite.matches = rewrite.matches, []
    readers, matmuls = Counter(match.input for match in matches), set(rewrite.seen)
    for match in matches:
        if (reason := should_rewrite(match, rewrite.config)) is None:
            choice = _choice(match, readers[match.input], matmuls, rewrite.config)
            if choice.fp8:
                rewrite.matches.append(match)
                rewrite.choices[match.node] = choice
                continue
            reason = f"{choice.remark} at M={hint(match.m)}"
        rewrite.refuse(match, reason)
    return len(matches) - len(rewrite.matches)
