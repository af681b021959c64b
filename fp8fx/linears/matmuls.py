"""linear, mm, matmul, bmm, mv, and those that add something to the product."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from fp8fx.graph.names import name_of
from fp8fx.graph.values import fake
from fp8fx.linears.form import Form
from fp8fx.linears.matches import LinearMatch, Refusal
from fp8fx.linears.site import NodeKinds, Site, columns, rows
from fp8fx.linears.views import NONE, Views, weight_on_the_left
from fp8fx.reasons import Because, CallReason, OperandReason, WeightReason

__all__ = ["match_matmul"]


def match_matmul(node: fx.Node, form: Form, kinds: NodeKinds) -> LinearMatch | Refusal:
    """A call that multiplies two operands, one of which may be a weight."""
    site = Site.of_call(node, form, kinds)
    arguments = form.bind(node)
    if arguments is None:
        return site.refuse(CallReason.OTHER_ARGUMENTS(names=", ".join(form.arguments)))
    left = arguments.get(form.left)
    right = arguments.get(form.right)
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return site.refuse(CallReason.OPERAND_NOT_IN_GRAPH())
    site = site.sized(rows(fake(left)), *columns(fake(right), form.is_transposed))
    if site.is_own(left, right):
        return site.refuse(WeightReason.OWN_OPERANDS())

    root = site.weight_behind(right)
    if root is not None:
        return _match_weight_on_the_right(site, left, right, root, arguments)
    root = site.weight_behind(left)
    if root is not None:
        return _match_weight_on_the_left(site, left, right, root, arguments)
    return site.refuse(_why_no_weight(site, right))


def _why_no_weight(site: Site, right: fx.Node) -> Because:
    """Of a matmul with no weight on either side."""
    if site.form.is_layer:
        return WeightReason.GIVEN() if right.op == "placeholder" else WeightReason.COMPUTED()
    return WeightReason.COMPUTED() if right in site.kinds.computed else WeightReason.ACTIVATIONS()


def _match_weight_on_the_right(
    site: Site, x: fx.Node, weight: fx.Node, root: fx.Node, arguments: dict[str, Any]
) -> LinearMatch | Refusal:
    """`x @ weight`, perhaps of several experts."""
    addend = _addend(site.form, arguments)
    if isinstance(addend, Because):
        return site.refuse(addend, name_of(root))
    known_x = fake(x)
    w = fake(weight)
    if site.form.addend is None and _is_a_batch_of_experts(known_x, w):
        return site.match_experts(x, weight, root)
    views = Views(weight=(("squeeze", 0),)) if _is_a_batch_of_one_weight(known_x, w) else NONE
    return site.match(x, weight, root, views=views, transposed=site.form.is_transposed, **addend)


def _match_weight_on_the_left(
    site: Site, weight: fx.Node, x: fx.Node, root: fx.Node, arguments: dict[str, Any]
) -> LinearMatch | Refusal:
    """`weight @ x`, which is `(x.mT @ weight.t()).mT`."""
    if not site.form.may_have_weight_on_the_left:
        return site.refuse(CallReason.ON_THE_LEFT(), name_of(root))
    w = fake(weight)
    known_x = fake(x)
    if w is None or w.dim() != 2:
        return site.refuse_shape(weight, root)
    if known_x is None:
        return site.refuse(OperandReason.SHAPE_UNKNOWN(), name_of(root))
    addend = _addend(site.form, arguments)
    if isinstance(addend, Because):
        return site.refuse(addend, name_of(root))
    return site.match(x, weight, root, views=weight_on_the_left(known_x.dim()), **addend)


def _addend(form: Form, arguments: dict[str, Any]) -> dict[str, Any] | Because:
    """MatmulMatch's bias, alpha and beta; or why the op cannot be given them."""
    if form.in_place:
        return CallReason.IN_PLACE()
    if form.sums_batch:
        return CallReason.BATCH_SUMMED()
    bias = None if form.addend is None else arguments.get(form.addend)
    alpha = arguments.get("alpha", 1)
    beta = arguments.get("beta", 1)
    if isinstance(alpha, fx.Node) or isinstance(beta, fx.Node):
        return CallReason.SCALAR_IN_GRAPH()
    if bias is not None and not isinstance(bias, fx.Node):
        return CallReason.ADDEND_NOT_IN_GRAPH()
    return {"bias": bias, "alpha": alpha, "beta": beta}


def _is_a_batch_of_experts(x: Tensor | None, w: Tensor | None) -> bool:
    """Whether `x` (E, M / E, K) and `w` (E, K, N) are the rows and the weights of several experts."""
    return x is not None and w is not None and x.dim() == w.dim() == 3 and x.shape[0] == w.shape[0] != 1


def _is_a_batch_of_one_weight(x: Tensor | None, w: Tensor | None) -> bool:
    """Whether `w` is (1, K, N) and `x` has a batch too, as einsum makes it."""
    return x is not None and w is not None and w.dim() == 3 and w.shape[0] == 1 and x.dim() > 2
