"""Every way to write a linear -> one LinearMatch, or a Refusal with its reason."""

from __future__ import annotations

from collections.abc import Set

from torch import fx

from fp8fx.graph.names import module_path, name_of
from fp8fx.graph.operators import called, spelling
from fp8fx.graph.values import attribute, fake
from fp8fx.linears.contractions import match_contraction
from fp8fx.linears.convolutions import match_convolution
from fp8fx.linears.forms import (
    ADDMM,
    CONTRACTIONS,
    CONVOLUTION_MODULES,
    CONVOLUTIONS,
    FUSED,
    GROUPED,
    GROUPED_FALLBACK,
    LEFT_ALONE,
    LINEAR,
    MATMULS,
    bind,
)
from fp8fx.linears.grouped import match_grouped
from fp8fx.linears.matches import LinearMatch, Refusal
from fp8fx.linears.modules import match_module
from fp8fx.linears.site import ACTIVATIONS, COMPUTED, GIVEN, OWN_OPERANDS, SHAPE_UNKNOWN, Site, columns, rows
from fp8fx.linears.views import NONE, Views, weight_on_the_left

__all__ = ["match_node"]


def match_node(
    node: fx.Node,
    gm: fx.GraphModule,
    constants: set[fx.Node],
    computed: Set[fx.Node] = frozenset(),
    convolutions: bool = False,
    states: Set[fx.Node] = frozenset(),
    own: Set[fx.Node] = frozenset(),
) -> LinearMatch | Refusal | None:
    """What the node is: a linear, a matmul that is none (with the reason), or no matmul at all (None).

    `constants` and `computed` are `graph`'s; the nodes' values, where known, are in their meta (`graph.propagate`). With `convolutions`
    those of size 1 are linears. `states` are constants that are activations in a matmul, which names no weight, unlike linear and addmm.
    `own` are the nodes that no input of the call reaches: a matmul of two of these, which names no weight either, is no linear.
    """
    operator = called(node)
    module = attribute(gm, str(node.target)) if node.op == "call_module" else None
    if operator in CONVOLUTIONS or isinstance(module, CONVOLUTION_MODULES):
        return match_convolution(node, gm, constants) if convolutions else None
    if node.op == "call_module":
        return match_module(node, gm)
    if operator in FUSED:
        return Refusal(
            node,
            operator,
            "a fused call that hides its linears, of inputs whose shapes are not known",
            module_path(node),
        )
    if operator in LEFT_ALONE:
        return Refusal(node, operator.removeprefix("linalg_"), LEFT_ALONE[operator], module_path(node))
    if operator == GROUPED:
        return match_grouped(node, constants, computed, states)
    if str(node.target).startswith(GROUPED_FALLBACK):
        return Refusal(
            node,
            GROUPED_FALLBACK,
            "not in bfloat16, the dtype that grouped matmuls have kernels for",
            module_path(node),
        )
    if operator in CONTRACTIONS:
        return match_contraction(node, constants, computed, states, own)
    if operator not in MATMULS:
        return None
    names = MATMULS[operator]
    site = Site(node, spelling(node), module_path(node), constants)
    if names not in (LINEAR, ADDMM):
        site.states, site.own = states, own
    arguments = bind(node, names)
    if arguments is None:
        return site.refuse(f"called with other arguments than {', '.join(names)}")

    left = arguments["mat1"] if "mat1" in arguments else arguments.get("input")
    transposed = names is LINEAR
    right = arguments.get("weight") if transposed else arguments.get("mat2")
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return site.refuse("an operand is not computed in the graph")
    x, w = fake(left), fake(right)
    site.sizes = rows(x), *columns(w, transposed)
    if site.is_own(left, right):
        return site.refuse(OWN_OPERANDS)

    root, turned = site.weight_behind(right), None
    if root is None:
        root = site.weight_behind(left)
        if root is None:
            given = transposed and right.op == "placeholder"
            return site.refuse(GIVEN if given else COMPUTED if transposed or right in computed else ACTIVATIONS)
        if transposed or ("mat1" in arguments and operator.rstrip("_") != "addmv"):
            return site.refuse("the weight is on the left of a linear or a sum", name_of(root))
        if x is None or x.dim() != 2:
            return site.refuse_shape(left, root)
        if w is None:
            return site.refuse(SHAPE_UNKNOWN, name_of(root))
        left, right, turned = right, left, weight_on_the_left(w.dim())
    if operator.endswith("_"):
        return site.refuse("the result is added to a tensor in place", name_of(root))
    if operator == "addbmm":
        return site.refuse("the products of a batch are summed", name_of(root))
    # In linear's own arguments the addend is `bias`; in addmm's it is `input`.
    bias = arguments.get("bias") if transposed else arguments.get("input") if "mat1" in arguments else None
    alpha, beta = arguments.get("alpha", 1), arguments.get("beta", 1)
    if isinstance(alpha, fx.Node) or isinstance(beta, fx.Node):
        return site.refuse("alpha or beta is computed in the graph", name_of(root))
    if bias is not None and not isinstance(bias, fx.Node):
        return site.refuse("the addend is not computed in the graph", name_of(root))
    addend = {"bias": bias, "alpha": alpha, "beta": beta}
    if turned is not None:
        return site.match(left, right, root, turned, **addend)
    plain = not transposed and "mat1" not in arguments
    if plain and w is not None and w.dim() == 3 and x is not None and x.dim() == 3 and x.shape[0] == w.shape[0] != 1:
        return site.match_experts(left, right, root)
    one = (
        w is not None and w.dim() == 3 and w.shape[0] == 1 and x is not None and x.dim() > 2
    )  # a batch of one weight, as einsum makes it
    views = Views(weight=(("squeeze", 0),)) if one else NONE
    return site.match(left, right, root, views, transposed, **addend)
