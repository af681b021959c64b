"""decide: a match that the user's filters leave out -> a Refusal. The graph stays as it is."""

from __future__ import annotations

from fnmatch import fnmatchcase

from fp8fx.config import Config
from fp8fx.match import LinearMatch
from fp8fx.rewrite import Rewrite

__all__ = ["MODIFIES", "run", "should_rewrite"]

MODIFIES = False


def _named(match: LinearMatch, patterns: tuple[str, ...]) -> str | None:
    """The first pattern that the match's module path or weight name fits."""
    return next((p for p in patterns if fnmatchcase(match.path, p) or fnmatchcase(match.name, p)), None)


def should_rewrite(match: LinearMatch, config: Config) -> str | None:
    """Why the match is not wanted; None if it is."""
    if pattern := _named(match, config.exclude):
        return f"excluded by {pattern!r}"
    if _named(match, config.include) is None:
        return f"not among include={', '.join(map(repr, config.include))}"
    if min(match.k, match.n) < config.min_features:
        return f"K={match.k}, N={match.n}: below min_features={config.min_features}"
    return None


def run(rewrite: Rewrite) -> int:
    """Moves what is not wanted from `matches` to `refusals`; returns how many."""
    matches, rewrite.matches = rewrite.matches, []
    for match in matches:
        if (reason := should_rewrite(match, rewrite.config)) is None:
            rewrite.matches.append(match)
        else:
            rewrite.refuse(match, reason)
    return len(matches) - len(rewrite.matches)
