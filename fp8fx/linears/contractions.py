"""einsum, tensordot and inner."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from fp8fx.graph.names import name_of
from fp8fx.graph.values import fake
from fp8fx.linears import einsum
from fp8fx.linears.einsum import Contraction
from fp8fx.linears.form import Form
from fp8fx.linears.matches import LinearMatch, Refusal
from fp8fx.linears.site import NodeKinds, Site
from fp8fx.reasons import Because, CallReason, OperandReason, WeightReason

__all__ = ["match_contraction"]


def match_contraction(node: fx.Node, form: Form, kinds: NodeKinds) -> LinearMatch | Refusal | None:
    """A call that sums over products of two operands, one of which may be a weight; None if nothing is summed."""
    assert form.read_contraction is not None
    site = Site.of_call(node, form, kinds)
    arguments = form.bind(node)
    if arguments is None or arguments.get("out") is not None:
        return site.refuse(CallReason.OTHER_ARGUMENTS(names=", ".join(form.arguments_of(node))))
    operands, contracted = form.read_contraction(arguments)
    if len(operands) != 2 or not all(isinstance(operand, fx.Node) for operand in operands):
        return site.refuse(CallReason.OPERAND_COUNT(count=len(operands)))
    place = next((place for place in (1, 0) if site.weight_behind(operands[place]) is not None), None)
    if place is None and kinds.computed & set(operands) and not site.is_own(*operands):
        return site.refuse(WeightReason.COMPUTED())
    tensors = [tensor for tensor in map(fake, operands) if tensor is not None]
    if len(tensors) < 2 or not isinstance(contracted, (str, int, tuple, list)):
        return site.refuse(WeightReason.ACTIVATIONS() if place is None else OperandReason.SHAPE_UNKNOWN())
    dims = [tensor.dim() for tensor in tensors]
    if form.needs_a_matrix and (max(dims) < 2 or 0 in dims):
        return None  # a dot product, which autocast does not cast, or a product by a number
    try:
        contraction_of_call = _contraction(contracted, dims)
    except (ValueError, IndexError):
        return site.refuse(CallReason.CONTRACTION_UNKNOWN())
    if not contraction_of_call.contracts:
        return None
    site = site.sized(*contraction_of_call.sizes(tensors))
    if site.is_own(*operands):
        return site.refuse(WeightReason.OWN_OPERANDS())
    if place is None:
        return site.refuse(WeightReason.ACTIVATIONS())
    return _match_weight_at(place, site, operands, tensors, contraction_of_call)


def _contraction(contracted: Any, dims: list[int]) -> Contraction:
    """Of einsum's equation, or of tensordot's dimensions."""
    if isinstance(contracted, str):
        return einsum.einsum(contracted, dims)
    return einsum.tensordot(contracted, dims)


def _match_weight_at(
    place: int, site: Site, operands: list[fx.Node], tensors: list[Tensor], contraction_of_call: Contraction
) -> LinearMatch | Refusal:
    weight = operands[place]
    root = site.weight_behind(weight)
    assert root is not None
    views = contraction_of_call.views(tensors, place)
    if isinstance(views, Because):
        return site.refuse(views, name_of(root))
    return site.match(operands[1 - place], weight, root, views=views)
