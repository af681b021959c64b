"""Every way to write a linear -> one LinearMatch, or a Refusal with its reason."""

from __future__ import annotations

import math
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fp8fx import contraction
from fp8fx.contraction import NONE, POINTWISE, Views, apply, laid_out
from fp8fx.forms import (
    ADDMM,
    CONTRACTIONS,
    CONVOLUTION,
    CONVOLUTION_MODULES,
    CONVOLUTIONS,
    FUSED,
    GROUPED,
    GROUPED_ARGUMENTS,
    GROUPED_FALLBACK,
    LEFT_ALONE,
    LINEAR,
    MATMULS,
    OPAQUE,
    TENSORDOT_OPERATOR,
    bind,
    first_argument,
    is_called_view,
    is_cast,
    is_gather,
)
from fp8fx.graph import attribute, fake, has_hooks, hint, module_path, name_of
from fp8fx.operators import called, is_operator, spelling

__all__ = ["COMPUTED", "LinearMatch", "Refusal", "match_node", "weight_behind"]


_Size = int | torch.SymInt | None


@dataclass(frozen=True)
class LinearMatch:
    """`alpha * (input @ weight) + beta * bias`, one way of writing it.

    Attributes:
        node: the node whose value it is.
        form: how it is written, as `F.linear`.
        path: the module it stands in.
        name: the name of the parameter, buffer or constant behind `weight`.
        input: (*, K), after `views`.
        weight: (N, K) where `transposed`, else (K, N), after `views`; None for a module called as a whole.
        module: the target of an nn.Linear called as a module, which holds weight and bias; else None.
        transposed: whether `weight` must be transposed to be the right operand.
        bias: the addend, of any shape that broadcasts to (*, N); None for none.
        alpha, beta: scalars, as addmm's.
        views: how the graph's input, weight and result are seen; a bias is added to the result as it is seen.
        m, k, n: the sizes of the matmul; m is None where it is not known, and may be symbolic.
        tensor: the weight's value, real or fake.
        grouped: whether each of several experts has rows and a weight of its own: the weight is (E, K, N).
        offs: of a grouped matmul whose input is (M, K), where the rows of each expert end; None where the input is (E, M / E, K).
    """

    node: fx.Node
    form: str
    path: str
    name: str
    input: fx.Node
    weight: fx.Node | None
    module: str | None
    transposed: bool
    bias: fx.Node | None
    alpha: float
    beta: float
    m: int | torch.SymInt | None
    k: int
    n: int
    tensor: Tensor
    views: Views = NONE
    grouped: bool = False
    offs: fx.Node | None = None

    @property
    def x(self) -> Tensor | None:
        """The input's value, as it is seen; None where it is not known."""
        known = fake(self.input)
        return None if known is None else apply(known, self.views.input)


@dataclass(frozen=True)
class Refusal:
    """A linear, or another matmul, that is left alone. Attributes as LinearMatch's; sizes are None where not known."""

    node: fx.Node
    form: str
    reason: str
    path: str = ""
    name: str = ""
    m: int | torch.SymInt | None = None
    k: int | torch.SymInt | None = None
    n: int | torch.SymInt | None = None


def _rows(x: Tensor | None) -> _Size:
    return None if x is None else math.prod(x.shape[:-1])


def _columns(w: Tensor | None, transposed: bool) -> tuple[_Size, _Size]:
    """K and N of a right operand (K, N), or (N, K) where `transposed`; of a vector (K,) one column."""
    if w is None or w.dim() < 2:
        return (w.shape[0], 1) if w is not None and w.dim() else (None, None)
    k, n = w.shape[:-3:-1] if transposed else w.shape[-2:]
    return k, n


COMPUTED = "the weight is computed, not a parameter, a buffer, a constant or a view of one"
_GIVEN = "the weight is an input of the graph, and no parameter"
_GATHERED = "the weight is gathered by an index"
_ACTIVATIONS = "activation times activation"
_OWN = "both operands are the model's own, and neither is an activation of the call"
_UNKNOWN = "the input's shape is not known; pass example inputs"


def _gathered(node: fx.Node, root: fx.Node) -> bool:
    """Whether an index that the graph computes chooses among the weights of `root`, of which `node` is a part."""
    while node is not root and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node is not root


def weight_behind(node: fx.Node, constants: Set[fx.Node]) -> fx.Node | None:
    """The one of `constants` that `node` is a view of, or a part, or a cast to fewer bits."""
    while node not in constants:
        source = first_argument(node)
        if not (is_called_view(node) or is_cast(node) or is_gather(node)) or not isinstance(source, fx.Node):
            return None
        node = source
    return node


@dataclass
class _Site:
    """A matmul, and what is known about it so far."""

    node: fx.Node
    form: str
    path: str
    constants: set[fx.Node]
    states: Set[fx.Node] = frozenset()
    own: Set[fx.Node] = frozenset()
    sizes: tuple[_Size, _Size, _Size] = (None, None, None)

    def refuse(self, reason: str, name: str = "") -> Refusal:
        return Refusal(self.node, self.form, reason, self.path, name, *self.sizes)

    def refuse_shape(self, weight: fx.Node, root: fx.Node) -> Refusal:
        """Of a weight that is not 2-D."""
        w = fake(weight)
        several = w is not None and w.dim() == 3
        return self.refuse(
            _GATHERED if several and _gathered(weight, root) else f"the weight is {'?' if w is None else w.dim()}-D, not 2-D", name_of(root)
        )

    def is_own(self, *operands: fx.Node) -> bool:
        """Whether the product is the model's own as well, such as the norm of a weight: no linear of the call."""
        return self.own >= set(operands)

    def weight_behind(self, node: fx.Node) -> fx.Node | None:
        found = weight_behind(node, self.constants)
        return None if found in self.states else found

    def match(
        self, x: fx.Node, weight: fx.Node, root: fx.Node, views: Views = NONE, transposed: bool = False, **addend: Any
    ) -> LinearMatch | Refusal:
        """`x @ weight` where the operands, so seen, are (*, K) and (K, N), or (N, K) where `transposed`."""
        name, known, w = name_of(root), fake(x), fake(weight)
        seen = None if w is None else apply(w, views.weight)
        if w is None or seen is None or seen.dim() != 2:
            return self.refuse_shape(weight, root)
        k, n = seen.shape[::-1] if transposed else seen.shape
        if not isinstance(k, int) or not isinstance(n, int):
            return self.refuse(f"the weight's shape ({k}, {n}) is symbolic", name)
        if known is not None:
            known = apply(known, views.input)
            if views is not NONE and (like := fake(self.node)) is not None:  # a plain matmul's result is contiguous, as the op's
                views = laid_out(views, apply(known.new_empty((*known.shape[:-1], n)), views.output), like)
        where = self.node, self.form, self.path, name
        return LinearMatch(
            *where,
            x,
            weight,
            None,
            transposed,
            m=_rows(known),
            k=k,
            n=n,
            tensor=w,
            views=views,
            **{"bias": None, "alpha": 1, "beta": 1, **addend},
        )

    def match_experts(self, x: fx.Node, weight: fx.Node, root: fx.Node, offs: fx.Node | None = None) -> LinearMatch | Refusal:
        """`x @ weight` where each expert has rows of `x`, (M, K) sorted by `offs` or (E, M / E, K), and its weight of (E, K, N)."""
        name, known, w = name_of(root), fake(x), fake(weight)
        assert w is not None
        if _gathered(weight, root):
            return self.refuse(_GATHERED, name)
        whole = fake(root)
        if whole is not None and (hint(w.numel()) or 0) > (hint(whole.numel()) or 0):
            return self.refuse("the weight is expanded over a batch", name)
        k, n = w.shape[-2:]
        if not isinstance(k, int) or not isinstance(n, int):
            return self.refuse(f"the weight's shape ({k}, {n}) is symbolic", name)
        where = self.node, self.form, self.path, name
        return LinearMatch(*where, x, weight, None, False, None, 1, 1, _rows(known), k, n, w, grouped=True, offs=offs)


def _match_module(node: fx.Node, gm: fx.GraphModule) -> LinearMatch | Refusal | None:
    path = str(node.target)
    module = attribute(gm, path)
    if isinstance(module, OPAQUE):
        return Refusal(node, type(module).__name__, "symbolic_trace does not look inside; pass torch.export.export(model, args)", path)
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
    return LinearMatch(node, form, path, f"{path}.weight", x, None, path, True, bias, 1, 1, _rows(fake(x)), k, n, module.weight)


def _is_pointwise(weight: Tensor, arguments: dict[str, Any]) -> bool:
    """Whether a convolution with these arguments looks at one pixel at a time, and at every one."""

    def every(name: str, default: int) -> bool:
        given = arguments.get(name, default)
        return all(x == default for x in (given if isinstance(given, (tuple, list)) else (given,)))

    padded = arguments.get("padding") not in ("valid", "same") and not every("padding", 0)
    return math.prod(weight.shape[2:]) == 1 and every("stride", 1) and every("groups", 1) and not padded


def _match_convolution(node: fx.Node, gm: fx.GraphModule, constants: set[fx.Node]) -> LinearMatch | Refusal | None:
    """A convolution of size 1; None for any other."""
    is_module = node.op == "call_module"
    module: Any = attribute(gm, str(node.target)) if is_module else None
    if is_module and (type(module) not in CONVOLUTION_MODULES or not {"weight", "bias"} <= module._parameters.keys()):
        return None
    arguments = bind(node, ("input",) if is_module else CONVOLUTION) or {}
    arguments |= {name: getattr(module, name) for name in ("stride", "padding", "groups")} if is_module else {}
    x, w, bias = arguments.get("input"), arguments.get("weight"), arguments.get("bias")
    weight = module.weight if module is not None else fake(w) if isinstance(w, fx.Node) else None
    if not isinstance(x, fx.Node) or weight is None or not _is_pointwise(weight, arguments):
        return None
    path = str(node.target) if is_module else module_path(node)
    site = _Site(node, type(module).__name__ if module is not None else spelling(node), path, constants)
    root = None if is_module or not isinstance(w, fx.Node) else site.weight_behind(w)
    name = f"{path}.weight" if is_module else "" if root is None else name_of(root)
    known, like = fake(x), fake(node)
    if is_module and has_hooks(module):
        return site.refuse("the module has hooks", name)
    if not is_module and root is None:
        return site.refuse(COMPUTED)
    if known is None or (like is None and node.users):
        return site.refuse(_UNKNOWN, name)
    if known.dim() != weight.dim():
        return site.refuse("a convolution of a single image", name)
    n, k = weight.shape[:2]
    seen = apply(known, POINTWISE.input)
    made = apply(known.new_empty((*seen.shape[:-1], n)), POINTWISE.output)
    views = POINTWISE if like is None else laid_out(POINTWISE, made, like)  # of a result that nobody reads it is not known
    bias = (None if module.bias is None else node) if module is not None else bias
    target, w = (path, None) if is_module else (None, w)
    return LinearMatch(node, site.form, path, name, x, w, target, False, bias, 1, 1, _rows(seen), k, n, weight, views)


def _match_contraction(
    node: fx.Node, constants: set[fx.Node], computed: Set[fx.Node], states: Set[fx.Node], own: Set[fx.Node]
) -> LinearMatch | Refusal | None:
    """An einsum or a tensordot; None where nothing is contracted."""
    operator = called(node)
    names, read = CONTRACTIONS[operator]
    if operator == "tensordot" and is_operator(node.target):
        names = TENSORDOT_OPERATOR
    site = _Site(node, spelling(node), module_path(node), constants, states, own)
    arguments = bind(node, names)
    if operator == "einsum" and not is_operator(node.target):  # einsum(equation, x, y) or einsum(equation, [x, y])
        arguments = {"equation": node.args[0], "operands": node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]}
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
        return site.refuse(_ACTIVATIONS if at is None else _UNKNOWN)
    dims = [x.dim() for x in known]
    if operator == "inner" and (max(dims) < 2 or 0 in dims):  # a dot product, which autocast does not cast, or a product by a number
        return None
    try:
        found = contraction.einsum(how, dims) if isinstance(how, str) else contraction.tensordot(how, dims)
    except (ValueError, IndexError):
        return site.refuse("what it contracts is not known")
    if not found.contracts:
        return None
    site.sizes = found.sizes(known)
    if site.is_own(*operands):
        return site.refuse(_OWN)
    if at is None:
        return site.refuse(_ACTIVATIONS)
    root = site.weight_behind(operands[at])
    assert root is not None
    views = found.views(known, at)
    return site.refuse(views, name_of(root)) if isinstance(views, str) else site.match(operands[1 - at], operands[at], root, views)


def _match_grouped(node: fx.Node, constants: set[fx.Node], computed: Set[fx.Node], states: Set[fx.Node]) -> LinearMatch | Refusal:
    """A grouped matmul."""
    site = _Site(node, spelling(node), module_path(node), constants, states)
    arguments = bind(node, GROUPED_ARGUMENTS)
    if arguments is None or any(arguments.get(name) is not None for name in ("bias", "out_dtype")):
        return site.refuse("called with other arguments than the operands and offs")
    left, right, offs = (arguments.get(name) for name in ("input", "mat2", "offs"))
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return site.refuse("an operand is not computed in the graph")
    x, w, root = fake(left), fake(right), site.weight_behind(right)
    site.sizes = (None if x is None else x.shape[0], *((None, None) if w is None or w.dim() < 2 else tuple(w.shape[-2:])))
    if root is None:
        return site.refuse(COMPUTED if right in computed else _ACTIVATIONS)
    name = name_of(root)
    if x is None or w is None:
        return site.refuse(_UNKNOWN, name)
    if not isinstance(offs, fx.Node) or x.dim() != 2 or w.dim() != 3:
        return site.refuse("not rows sorted by experts and a weight for each", name)
    return site.match_experts(left, right, root, offs)


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
        return _match_convolution(node, gm, constants) if convolutions else None
    if node.op == "call_module":
        return _match_module(node, gm)
    if operator in FUSED:
        return Refusal(node, operator, "a fused call that hides its linears, of inputs whose shapes are not known", module_path(node))
    if operator in LEFT_ALONE:
        return Refusal(node, operator.removeprefix("linalg_"), LEFT_ALONE[operator], module_path(node))
    if operator == GROUPED:
        return _match_grouped(node, constants, computed, states)
    if str(node.target).startswith(GROUPED_FALLBACK):
        return Refusal(node, GROUPED_FALLBACK, "not in bfloat16, the dtype that grouped matmuls have kernels for", module_path(node))
    if operator in CONTRACTIONS:
        return _match_contraction(node, constants, computed, states, own)
    if operator not in MATMULS:
        return None
    names = MATMULS[operator]
    site = _Site(node, spelling(node), module_path(node), constants)
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
    site.sizes = _rows(x), *_columns(w, transposed)
    if site.is_own(left, right):
        return site.refuse(_OWN)

    root, turned = site.weight_behind(right), None
    if root is None:
        root = site.weight_behind(left)
        if root is None:
            given = transposed and right.op == "placeholder"
            return site.refuse(_GIVEN if given else COMPUTED if transposed or right in computed else _ACTIVATIONS)
        if transposed or ("mat1" in arguments and operator.rstrip("_") != "addmv"):
            return site.refuse("the weight is on the left of a linear or a sum", name_of(root))
        if x is None or x.dim() != 2:
            return site.refuse_shape(left, root)
        if w is None:
            return site.refuse(_UNKNOWN, name_of(root))
        left, right, turned = right, left, contraction.left(w.dim())
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
    one = w is not None and w.dim() == 3 and w.shape[0] == 1 and x is not None and x.dim() > 2  # a batch of one weight, as einsum makes it
    views = Views(weight=(("squeeze", 0),)) if one else NONE
    return site.match(left, right, root, views, transposed, **addend)
