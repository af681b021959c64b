"""Grouped matmuls: rows sorted by experts."""

from __future__ import annotations

from collections.abc import Set

from torch import fx

from fp8fx.graph.names import module_path, name_of
from fp8fx.graph.operators import spelling
from fp8fx.graph.values import fake
from fp8fx.linears.forms import GROUPED_ARGUMENTS, bind
from fp8fx.linears.matches import LinearMatch, Refusal
from fp8fx.linears.site import ACTIVATIONS, COMPUTED, SHAPE_UNKNOWN, Site

__all__ = ["match_grouped"]


def match_grouped(
    node: fx.Node, constants: set[fx.Node], computed: Set[fx.Node], states: Set[fx.Node]
) -> LinearMatch | Refusal:
    """A grouped matmul."""
    site = Site(node, spelling(node), module_path(node), constants, states)
    arguments = bind(node, GROUPED_ARGUMENTS)
    if arguments is None or any(arguments.get(name) is not None for name in ("bias", "out_dtype")):
        return site.refuse("called with other arguments than the operands and offs")
    left, right, offs = (arguments.get(name) for name in ("input", "mat2", "offs"))
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return site.refuse("an operand is not computed in the graph")
    x, w, root = fake(left), fake(right), site.weight_behind(right)
    site.sizes = (
        None if x is None else x.shape[0],
        *((None, None) if w is None or w.dim() < 2 else tuple(w.shape[-2:])),
    )
    if root is None:
        return site.refuse(COMPUTED if right in computed else ACTIVATIONS)
    name = name_of(root)
    if x is None or w is None:
        return site.refuse(SHAPE_UNKNOWN, name)
    if not isinstance(offs, fx.Node) or x.dim() != 2 or w.dim() != 3:
        return site.refuse("not rows sorted by experts and a weight for each", name)
    return site.match_experts(left, right, root, offs)
