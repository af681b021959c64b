"""einsum, tensordot and inner."""

from __future__ import annotations

from collections.abc import Set

from torch import fx

from fp8fx.graph.names import module_path, name_of
from fp8fx.graph.operators import called, is_operator, spelling
from fp8fx.graph.values import fake
from fp8fx.linears import contraction
from fp8fx.linears.forms import CONTRACTIONS, TENSORDOT_OPERATOR, bind
from fp8fx.linears.matches import LinearMatch, Refusal
from fp8fx.linears.site import ACTIVATIONS, COMPUTED, OWN_OPERANDS, SHAPE_UNKNOWN, Site

__all__ = ["match_contraction"]


def match_contraction(
    node: fx.Node, constants: set[fx.Node], computed: Set[fx.Node], states: Set[fx.Node], own: Set[fx.Node]
) -> LinearMatch | Refusal | None:
    """An einsum or a tensordot; None where nothing is contracted."""
    operator = called(node)
    names, read = CONTRACTIONS[operator]
    if operator == "tensordot" and is_operator(node.target):
        names = TENSORDOT_OPERATOR
    site = Site(node, spelling(node), module_path(node), constants, states, own)
    arguments = bind(node, names)
    if operator == "einsum" and not is_operator(node.target):  # einsum(equation, x, y) or einsum(equation, [x, y])
        arguments = {
            "equation": node.args[0],
            "operands": node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:],
        }
    if arguments is None or arguments.get("out") is not None:
        return site.refuse(f"called with other arguments than {', '.join(names)}")
    operands, how = read(arguments)
    if len(operands) != 2 or not all(isinstance(x, fx.Node) for x in operands):
        return site.refuse(f"{len(operands)} operands, or one that is not computed in the graph")
    at = next((i for i in (1, 0) if site.weight_behind(operands[i]) is not None), None)
    known = [x for x in map(fake, operands) if x is not None]
    if at is None and computed & set(operands) and not site.is_own(*operands):
        return site.refuse(COMPUTED)
    if len(known) < 2 or not isinstance(how, (str, int, tuple, list)):
        return site.refuse(ACTIVATIONS if at is None else SHAPE_UNKNOWN)
    dims = [x.dim() for x in known]
    if operator == "inner" and (
        max(dims) < 2 or 0 in dims
    ):  # a dot product, which autocast does not cast, or a product by a number
        return None
    try:
        found = contraction.einsum(how, dims) if isinstance(how, str) else contraction.tensordot(how, dims)
    except (ValueError, IndexError):
        return site.refuse("what it contracts is not known")
    if not found.contracts:
        return None
    site.sizes = found.sizes(known)
    if site.is_own(*operands):
        return site.refuse(OWN_OPERANDS)
    if at is None:
        return site.refuse(ACTIVATIONS)
    root = site.weight_behind(operands[at])
    assert root is not None
    views = found.views(known, at)
    return (
        site.refuse(views, name_of(root))
        if isinstance(views, str)
        else site.match(operands[1 - at], operands[at], root, views)
    )
