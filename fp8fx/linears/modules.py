"""nn.Linear, called as a module."""

from __future__ import annotations

from torch import fx, nn

from fp8fx.graph.hooks import has_hooks
from fp8fx.graph.values import attribute, fake
from fp8fx.linears.forms import OPAQUE
from fp8fx.linears.matches import LinearMatch, Refusal
from fp8fx.linears.site import COMPUTED, rows

__all__ = ["match_module"]


def match_module(node: fx.Node, gm: fx.GraphModule) -> LinearMatch | Refusal | None:
    path = str(node.target)
    module = attribute(gm, path)
    if isinstance(module, OPAQUE):
        return Refusal(
            node,
            type(module).__name__,
            "symbolic_trace does not look inside; pass torch.export.export(model, args)",
            path,
        )
    if not isinstance(module, nn.Linear):
        return None
    form = type(module).__name__
    if getattr(module.forward, "__func__", None) is not nn.Linear.forward:
        return Refusal(node, form, f"{form} has a forward of its own", path)
    if not {"weight", "bias"} <= module._parameters.keys() | module._buffers.keys():
        return Refusal(node, form, COMPUTED, path)
    if has_hooks(module):
        return Refusal(node, form, "the module has hooks", path)
    x = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(x, fx.Node):
        return Refusal(node, form, "the input is not computed in the graph", path)
    n, k = module.weight.shape
    bias = None if module.bias is None else node
    return LinearMatch(
        node, form, path, f"{path}.weight", x, None, path, True, bias, 1, 1, rows(fake(x)), k, n, module.weight
    )
