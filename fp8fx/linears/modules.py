"""nn.Linear, called as a module."""

from __future__ import annotations

from torch import fx, nn

from fp8fx.graph.hooks import has_hooks
from fp8fx.graph.values import fake
from fp8fx.linears.form import Form
from fp8fx.linears.forms import OPAQUE
from fp8fx.linears.matches import LinearMatch, ModuleMatch, Refusal
from fp8fx.linears.site import rows
from fp8fx.reasons import Because, CallReason, WeightReason

__all__ = ["match_linear_module", "refuse_opaque"]


def refuse_opaque(node: fx.Node, module: nn.Module) -> Refusal | None:
    """A module that hides its linears; None for any other."""
    if not isinstance(module, OPAQUE):
        return None
    return Refusal(node=node, spelling=type(module).__name__, reason=CallReason.NOT_TRACED(), path=str(node.target))


def _why_no_linear(module: nn.Linear) -> Because | None:
    """Why a call of the module is not `linear(input, weight, bias)` with weights of its own; None if it is."""
    if getattr(module.forward, "__func__", None) is not nn.Linear.forward:
        return CallReason.OWN_FORWARD(form=type(module).__name__)
    if not {"weight", "bias"} <= module._parameters.keys() | module._buffers.keys():
        return WeightReason.COMPUTED()
    if has_hooks(module):
        return CallReason.HOOKS()
    return None


def match_linear_module(node: fx.Node, form: Form, module: nn.Linear) -> LinearMatch | Refusal:
    """A call of an nn.Linear."""
    path = str(node.target)
    spelling = type(module).__name__
    x = node.args[0] if node.args else node.kwargs.get("input")
    why = _why_no_linear(module)
    if why is not None:
        return Refusal(node=node, spelling=spelling, reason=why, path=path)
    if not isinstance(x, fx.Node):
        return Refusal(node=node, spelling=spelling, reason=CallReason.INPUT_NOT_IN_GRAPH(), path=path)
    n, k = module.weight.shape
    return ModuleMatch(
        node=node,
        form=form,
        spelling=spelling,
        path=path,
        name=f"{path}.weight",
        input=x,
        tensor=module.weight,
        m=rows(fake(x)),
        k=k,
        n=n,
        transposed=True,
        module=path,
        has_bias=module.bias is not None,
    )
