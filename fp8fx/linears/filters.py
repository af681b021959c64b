"""Which linears the user wants, by name and size."""

from __future__ import annotations

from fnmatch import fnmatchcase

from fp8fx.config import Config
from fp8fx.reasons import Because, OptionReason

__all__ = ["why_filtered"]


def _first_fit(path: str, name: str, patterns: tuple[str, ...]) -> str | None:
    """The first pattern that the module path or the weight's name fits."""
    return next((p for p in patterns if fnmatchcase(path, p) or fnmatchcase(name, p)), None)


def why_filtered(path: str, name: str, k: int, n: int, config: Config) -> Because | None:
    """Why the user does not want a linear of this module path, weight's name, K and N; None if they do."""
    if pattern := _first_fit(path, name, config.exclude):
        return OptionReason.EXCLUDED(pattern=pattern)
    if _first_fit(path, name, config.include) is None:
        return OptionReason.NOT_INCLUDED(include=", ".join(map(repr, config.include)))
    if min(k, n) < config.min_features:
        return OptionReason.TOO_NARROW(k=k, n=n, min_features=config.min_features)
    return None
