"""match: every matmul of the graph -> a LinearMatch, or a Refusal with its reason. The graph stays as it is."""

from __future__ import annotations

from fp8fx.graph import computed, constants, propagate
from fp8fx.match import LinearMatch, match_node
from fp8fx.rewrite import Rewrite

__all__ = ["MODIFIES", "run"]

MODIFIES = False


def run(rewrite: Rewrite) -> int:
    """Fills `seen`, `matches` and `refusals`; returns how many linears it matched."""
    propagate(rewrite.gm, rewrite.example_inputs)
    weights = constants(rewrite.gm, rewrite.example_inputs)
    made = computed(rewrite.gm, weights)
    for node in rewrite.gm.graph.nodes:
        found = match_node(node, rewrite.gm, weights, made, rewrite.config.convolutions)
        if found is None:
            continue
        rewrite.seen.append(node)
        if isinstance(found, LinearMatch):
            rewrite.matches.append(found)
        else:
            rewrite.refusals.append(found)
    return len(rewrite.matches)
