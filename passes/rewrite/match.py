"""match: every matmul of the graph -> a LinearMatch, or a Refusal with its reason. The graph computes what it did."""

from __future__ import annotations

from torch import fx, nn

from fp8fx.graph.constants import computed, constants, real, repeats
from fp8fx.graph.mutations import Writes
from fp8fx.graph.names import OWN
from fp8fx.graph.propagate import propagate
from fp8fx.graph.values import value
from fp8fx.linears.match import match_node
from fp8fx.linears.matches import LinearMatch
from fp8fx.linears.site import NodeKinds
from fp8fx.pipeline import Rewrite
from fp8fx.torch_internals import HigherOrderOperator

__all__ = ["MODIFIES", "run"]

MODIFIES = False


def _is_parameter(rewrite: Rewrite, node: fx.Node) -> bool:
    return any(isinstance(x, nn.Parameter) for x in (value(node), real(rewrite.gm, rewrite.example_inputs, node)))


def own_module(rewrite: Rewrite, weights: set[fx.Node], writes: Writes) -> set[fx.Node]:
    """The nodes that no input of the call reaches, and no random number.

    These are parameters, buffers and constants, and what is made of them alone.
    """
    reached: set[fx.Node] = set()  # in memory that is changed by what an input reaches
    while True:
        own: set[fx.Node] = set()
        for node in rewrite.gm.graph.nodes:
            made = (
                node.op in ("call_function", "call_method") and repeats(node) and own.issuperset(node.all_input_nodes)
            )
            held = node in weights or node.op == "get_attr" or OWN in node.meta
            if (made or held) and node not in reached:
                own.add(node)
        foreign = {node for node in writes.writers if not own.issuperset(node.all_input_nodes)}
        found = {
            node for node in own & writes.changed_by(foreign) if node not in weights or not _is_parameter(rewrite, node)
        }
        if not found:
            return own
        reached |= found


def _written(rewrite: Rewrite, weights: set[fx.Node], writes: Writes) -> dict[fx.Node, set[fx.Node]]:
    """The buffers and constants that the graph changes in place, as a cache of keys and values, by the first node that does."""
    found: dict[fx.Node, set[fx.Node]] = {}
    for node in weights:
        first = writes.first(node)
        if first is None or _is_parameter(rewrite, node):
            continue  # a parameter that a step of training updates is a weight before and after
        found.setdefault(first, set()).add(node)
    return found


def run(rewrite: Rewrite) -> int:
    """Fills `weights`, `own`, `seen`, `matches` and `refusals`; returns how many linears it matched."""
    propagate(rewrite.gm, rewrite.example_inputs)
    weights = constants(rewrite.gm, rewrite.example_inputs)
    writes = Writes(rewrite.gm, rewrite.example_inputs)
    written = _written(rewrite, weights, writes)
    seen = [nodes for first, nodes in written.items() if not isinstance(first.target, HigherOrderOperator)]
    rewrite.weights = weights.difference(*seen)  # what a body does to its inputs the body tells
    rewrite.own = own_module(rewrite, weights, writes)
    made, states = computed(rewrite.gm, weights.difference(*written.values())), set[fx.Node]()
    kinds = NodeKinds(constants=weights, computed=made, states=states, own=rewrite.own)
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
