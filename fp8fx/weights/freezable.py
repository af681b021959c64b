"""Whether a weight can be quantized beforehand."""

from __future__ import annotations

from fp8fx.graph.constants import expression
from fp8fx.graph.facts import Facts
from fp8fx.linears.matches import GroupedMatch, LinearMatch, MatmulMatch

__all__ = ["can_freeze"]


def can_freeze(match: LinearMatch, facts: Facts) -> bool:
    """Whether the weight's value is known when the graph is rewritten, and the graph does not change it."""
    if not isinstance(match, MatmulMatch | GroupedMatch):
        return facts.writes.leave([match.tensor])
    origin = expression(match.weight, facts.constants)
    if origin is None:
        return False
    sources, steps = origin
    return facts.writes.leave((*sources, *steps)) and all(node in facts.tensors for node in sources)
