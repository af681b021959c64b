"""Grouped matmuls: rows sorted by experts."""

from __future__ import annotations

from torch import fx

from fp8fx.graph.names import name_of
from fp8fx.graph.values import fake
from fp8fx.linears.form import Form
from fp8fx.linears.matches import LinearMatch, Refusal
from fp8fx.linears.site import NodeKinds, Site
from fp8fx.reasons import CallReason, OperandReason, WeightReason

__all__ = ["match_grouped"]


def match_grouped(node: fx.Node, form: Form, kinds: NodeKinds) -> LinearMatch | Refusal:
    """A call that multiplies the rows of each expert by a weight of its own."""
    site = Site.of_call(node, form, kinds)
    arguments = form.bind(node)
    if arguments is None or any(arguments.get(name) is not None for name in ("bias", "out_dtype")):
        return site.refuse(CallReason.OTHER_ARGUMENTS(names="the operands and offs"))
    x = arguments.get(form.left)
    weight = arguments.get(form.right)
    offs = arguments.get("offs")
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node):
        return site.refuse(CallReason.OPERAND_NOT_IN_GRAPH())
    known_x = fake(x)
    w = fake(weight)
    k, n = (None, None) if w is None or w.dim() < 2 else w.shape[-2:]
    site = site.sized(None if known_x is None else known_x.shape[0], k, n)
    root = site.weight_behind(weight)
    if root is None:
        return site.refuse(WeightReason.COMPUTED() if weight in kinds.computed else WeightReason.ACTIVATIONS())
    if known_x is None or w is None:
        return site.refuse(OperandReason.SHAPE_UNKNOWN(), name_of(root))
    if not isinstance(offs, fx.Node) or known_x.dim() != 2 or w.dim() != 3:
        return site.refuse(CallReason.NOT_GROUPED(), name_of(root))
    return site.match_experts(x, weight, root, offs)
