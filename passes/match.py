"""match: every matmul of the graph -> a LinearMatch, or a Refusal with its reason. The graph computes what it did."""

from __future__ import annotations

from torch import fx, nn

from fp8fx.graph import computed, constants, propagate, real, value
from fp8fx.match import LinearMatch, match_node
from fp8fx.rewrite import Rewrite
from fp8fx.torch_internals import HigherOrderOperator
from fp8fx.writes import Writes

__all__ = ["MODIFIES", "run"]

MODIFIES = False


def _written(rewrite: Rewrite, weights: set[fx.Node]) -> dict[fx.Node, set[fx.Node]]:
    """The buffers and constants that the graph changes in place, as a cache of keys and values, by the first node that does."""
    writes, found = Writes(rewrite.gm, rewrite.example_inputs), dict[fx.Node, set[fx.Node]]()
    for node in weights:
        first = writes.first(node)
        if first is None or any(isinstance(x, nn.Parameter) for x in (value(node), real(rewrite.gm, rewrite.example_inputs, node))):
            continue  # a parameter that a step of training updates is a weight before and after
        found.setdefault(first, set()).add(node)
    return found


def run(rewrite: Rewrite) -> int:
    """Fills `weights`, `seen`, `matches` and `refusals`; returns how many linears it matched."""
    propagate(rewrite.gm, rewrite.example_inputs)
    weights = constants(rewrite.gm, rewrite.example_inputs)
    written = _written(rewrite, weights)
    seen = [nodes for first, nodes in written.items() if not isinstance(first.target, HigherOrderOperator)]
    rewrite.weights = weights.difference(*seen)  # what a body does to its inputs the body tells
    made, states = computed(rewrite.gm, weights.difference(*written.values())), set[fx.Node]()
    for node in rewrite.gm.graph.nodes:
        states |= written.get(node, set())
        found = match_node(node, rewrite.gm, weights, made, rewrite.config.convolutions, states)
        if found is None:
            continue
        rewrite.seen.append(node)
        if isinstance(found, LinearMatch):
            rewrite.matches.append(found)
        else:
            rewrite.refusals.append(found)
    return len(rewrite.matches)
