"""match: every matmul of the graph -> a LinearMatch, or a Refusal with its reason. The graph computes what it did."""

from __future__ import annotations

from torch import fx

from fp8fx.linears.match import match_node
from fp8fx.linears.matches import LinearMatch
from fp8fx.linears.site import NodeKinds
from fp8fx.pipeline import Rewrite
from fp8fx.torch_internals import HigherOrderOperator

__all__ = ["CHANGES", "NEEDS", "run"]

NEEDS: tuple[str, ...] = ("shapes", "constants", "states", "computed_weights", "own")
CHANGES = False


def run(rewrite: Rewrite) -> int:
    """Fills `weights`, `own`, `seen`, `matches` and `refusals`; returns how many linears it matched."""
    facts = rewrite.facts
    weights, written, made = facts.constants, facts.states, facts.computed_weights
    seen = [nodes for first, nodes in written.items() if not isinstance(first.target, HigherOrderOperator)]
    rewrite.weights = weights.difference(*seen)  # what a body does to its inputs the body tells
    rewrite.own = facts.own
    states = set[fx.Node]()
    kinds = NodeKinds(constants=weights, computed=made, states=states, own=facts.own)
    for node in rewrite.gm.graph.nodes:
        states |= written.get(node, set())
        found = match_node(node, rewrite.gm, kinds, rewrite.config.convolutions)
        if found is None:
            continue
        rewrite.seen.append(node)
        if isinstance(found, LinearMatch):
            rewrite.matches.append(found)
        else:
            rewrite.refusals.append(found)
    return len(rewrite.matches)
