"""Every way to write a linear -> a match, or a Refusal with its reason.

The table of forms says which matcher reads a node.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from fp8fx.graph.names import module_path
from fp8fx.graph.values import attribute
from fp8fx.linears.contractions import match_contraction
from fp8fx.linears.convolutions import match_convolution, match_convolution_module
from fp8fx.linears.form import Family, Form
from fp8fx.linears.forms import form_of, form_of_module
from fp8fx.linears.grouped import match_grouped
from fp8fx.linears.matches import LinearMatch, Refusal
from fp8fx.linears.matmuls import match_matmul
from fp8fx.linears.modules import match_linear_module, refuse_opaque
from fp8fx.linears.site import NodeKinds

__all__ = ["match_node"]

Matmul = LinearMatch | Refusal | None
"""What a node is: a linear, another matmul, or neither."""


def _leave_alone(node: fx.Node, form: Form, kinds: NodeKinds) -> Refusal:
    """A call that is never rewritten."""
    assert form.why_left_alone is not None
    spelling = form.operator.removeprefix("linalg_")
    return Refusal(node=node, spelling=spelling, reason=form.why_left_alone(), path=module_path(node))


_MATCHERS: dict[Family, Callable[[fx.Node, Form, NodeKinds], Matmul]] = {
    Family.MATMUL: match_matmul,
    Family.CONTRACTION: match_contraction,
    Family.CONVOLUTION: match_convolution,
    Family.GROUPED: match_grouped,
    Family.LEFT_ALONE: _leave_alone,
}
"""Who reads a call of a function, method or operator, by the family of its form."""


_MODULE_MATCHERS: dict[Family, Callable[[fx.Node, Form, Any], Matmul]] = {
    Family.MATMUL: match_linear_module,
    Family.CONVOLUTION: match_convolution_module,
}
"""Who reads a call of a module."""


def match_node(node: fx.Node, gm: fx.GraphModule, kinds: NodeKinds, convolutions: bool = False) -> Matmul:
    """What the node is: a linear, a matmul that is none (with the reason), or no matmul at all (None).

    Args:
        node: a node of `gm`. Its value and those of its operands are in the nodes' meta if they are known; see
            `graph.propagate`.
        gm: the graph's module.
        kinds: which of the graph's nodes may be weights.
        convolutions: whether convolutions of size 1 are linears.
    """
    if node.op == "call_module":
        return _match_module(node, gm, convolutions)
    form = form_of(node)
    if form is None or (form.family is Family.CONVOLUTION and not convolutions):
        return None
    return _MATCHERS[form.family](node, form, kinds)


def _match_module(node: fx.Node, gm: fx.GraphModule, convolutions: bool) -> Matmul:
    module = attribute(gm, str(node.target))
    form = form_of_module(module)
    if form is None:
        return refuse_opaque(node, module)
    if form.family is Family.CONVOLUTION and not convolutions:
        return None
    return _MODULE_MATCHERS[form.family](node, form, module)
