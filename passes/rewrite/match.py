"""match: every matmul of the graph -> a LinearMatch, or a Refusal with its reason. The graph computes what it did."""

from __future__ import annotations

from torch import fx

from fp8fx.linears.matches import LinearMatch
from fp8fx.linears.recognise import match_node
from fp8fx.linears.site import NodeKinds
from fp8fx.pipeline import Rewrite
from fp8fx.torch_internals import HigherOrderOperator

__all__ = ["CHANGES", "NEEDS", "run"]

NEEDS: tuple[str, ...] = ("shapes", "constants", "states", "computed_weights", "own")
CHANGES = False


def run(rewrite: Rewrite) -> int:
    """Fills `weights`, `own`, `seen`, `matches` and `refusals`; returns how many linears it matched."""
    facts = rewrite.facts
    # What a body does to its inputs the body tells.
    written_here = [
        nodes for writer, nodes in facts.states.items() if not isinstance(writer.target, HigherOrderOperator)
    ]
    rewrite.weights = facts.constants.difference(*written_here)
    rewrite.own = facts.own
    states: set[fx.Node] = set()
    kinds = NodeKinds(constants=facts.constants, computed=facts.computed_weights, states=states, own=facts.own)
    for node in rewrite.gm.graph.nodes:
        states |= facts.states.get(node, set())
        matmul = match_node(node, rewrite.gm, kinds, rewrite.config.convolutions)
        if matmul is None:
            continue
        rewrite.seen.append(node)
        if isinstance(matmul, LinearMatch):
            rewrite.matches.append(matmul)
        else:
            rewrite.refusals.append(matmul)
    return len(rewrite.matches)
