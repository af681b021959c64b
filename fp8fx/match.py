"""Every way to write a linear -> one LinearMatch, or a Refusal with its reason."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fp8fx.graph import attribute, fake, module_path, name_of

__all__ = ["LinearMatch", "Refusal", "is_called_view", "is_view", "match_node"]

aten = torch.ops.aten


@dataclass(frozen=True)
class LinearMatch:
    """`alpha * (input @ weight) + beta * bias`, one way of writing it.

    Attributes:
        node: the node whose value it is.
        form: how it is written, as `F.linear`.
        path: the module it stands in.
        name: the name of the parameter, buffer or constant behind `weight`.
        input: (*, K).
        weight: (N, K) where `transposed`, else (K, N); None for a module called as a whole.
        module: the target of an nn.Linear called as a module, which holds weight and bias; else None.
        transposed: whether `weight` must be transposed to be the right operand.
        bias: the addend, of any shape that broadcasts to (*, N); None for none.
        alpha, beta: scalars, as addmm's.
        m, k, n: the sizes of the matmul; m is None where it is not known, and may be symbolic.
        tensor: the weight's value, real or fake.
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


# What a matmul's arguments are called, in order. The right operand is (K, N), but for linear's weight (N, K).
_LINEAR = ("input", "weight", "bias")
_ADDMM = ("input", "mat1", "mat2", "beta", "alpha")
_MATMUL = ("input", "mat2")

_FUNCTIONS: dict[Callable[..., Any], tuple[str, tuple[str, ...]]] = {
    F.linear: ("F.linear", _LINEAR),
    aten.linear.default: ("aten.linear", _LINEAR),
    torch.addmm: ("addmm", _ADDMM),
    aten.addmm.default: ("aten.addmm", _ADDMM),
    torch.mm: ("mm", _MATMUL),
    aten.mm.default: ("aten.mm", _MATMUL),
    torch.matmul: ("matmul", _MATMUL),
    aten.matmul.default: ("aten.matmul", _MATMUL),
    operator.matmul: ("@", _MATMUL),
    operator.imatmul: ("@=", _MATMUL),  # tensors have none of their own: `x @= w` is `x = x @ w`
    torch.bmm: ("bmm", _MATMUL),
    aten.bmm.default: ("aten.bmm", _MATMUL),
    torch.baddbmm: ("baddbmm", ("input", "batch1", "batch2", "beta", "alpha")),
    aten.baddbmm.default: ("aten.baddbmm", ("input", "batch1", "batch2", "beta", "alpha")),
}
_METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "addmm": (".addmm", _ADDMM),
    "mm": (".mm", _MATMUL),
    "matmul": (".matmul", _MATMUL),
    "__matmul__": ("@", _MATMUL),
    "bmm": (".bmm", _MATMUL),
    "baddbmm": (".baddbmm", ("input", "batch1", "batch2", "beta", "alpha")),
}
_ALIASES = {"other": "mat2", "self": "input", "tensor2": "mat2"}
_SYNONYMS = {"batch1": "mat1", "batch2": "mat2"}

# What leaves a weight a weight: views, and copies that change no value.
_VIEW_METHODS = {
    "t",
    "transpose",
    "permute",
    "view",
    "reshape",
    "contiguous",
    "narrow",
    "detach",
    "squeeze",
    "unsqueeze",
    "flatten",
    "unflatten",
    "expand",
    "swapaxes",
    "swapdims",
    "movedim",
    "moveaxis",
    "chunk",
    "split",
    "split_with_sizes",
    "unbind",
    "select",
    "clone",
}
_VIEW_FUNCTIONS: set[Any] = {getattr(torch, name) for name in _VIEW_METHODS if hasattr(torch, name)} | {
    operator.getitem,
    torch._C._autograd._get_data_attr,  # type: ignore[attr-defined]  # Dynamo's `.data`
}
_VIEW_ATEN = {getattr(aten, name) for name in (*_VIEW_METHODS, "mT", "numpy_T", "slice", "alias", "_unsafe_view") if hasattr(aten, name)}
_VIEW_ATTRIBUTES = {"T", "mT", "data"}


def is_view(node: fx.Node) -> bool:
    """Whether the node is a view of its one input, or a copy of it that changes no value."""
    return len(node.all_input_nodes) == 1 and is_called_view(node)  # else gathered or sliced by what another node computes


def is_called_view(node: fx.Node) -> bool:
    """Whether what the node calls gives a view of its first argument, or a copy of it that changes no value."""
    if node.op == "call_method":
        return node.target in _VIEW_METHODS
    if node.op != "call_function" or not node.args:
        return False
    if node.target is getattr:
        return node.args[1] in _VIEW_ATTRIBUTES
    return node.target in _VIEW_FUNCTIONS or getattr(node.target, "overloadpacket", None) in _VIEW_ATEN


def _weight_behind(node: fx.Node, constants: set[fx.Node]) -> fx.Node | None:
    """The parameter, buffer or constant that `node` is a view of."""
    while node not in constants:
        if not is_view(node) or not isinstance(node.args[0], fx.Node):
            return None
        node = node.args[0]
    return node


def _rows(x: Tensor | None) -> int | torch.SymInt | None:
    return None if x is None else math.prod(x.shape[:-1])


def _bind(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any] | None:
    """The call's arguments by name; None if it has others than `names`."""
    bound = dict(zip(names, node.args, strict=False))
    for key, argument in node.kwargs.items():
        bound[key if key in names else _ALIASES.get(key, key)] = argument
    if len(node.args) > len(names) or not set(bound) <= set(names):
        return None
    return {_SYNONYMS.get(name, name): argument for name, argument in bound.items()}


_COMPUTED = "the weight is computed, not a parameter, a buffer, a constant or a view of one"


def _match_module(node: fx.Node, gm: fx.GraphModule) -> LinearMatch | Refusal | None:
    path = str(node.target)
    module = attribute(gm, path)
    if not isinstance(module, nn.Linear):
        return None
    form = type(module).__name__
    if getattr(module.forward, "__func__", None) is not nn.Linear.forward:
        return Refusal(node, form, f"{form} has a forward of its own", path)
    if not {"weight", "bias"} <= module._parameters.keys() | module._buffers.keys():
        return Refusal(node, form, _COMPUTED, path)
    if any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)):
        return Refusal(node, form, "the module has hooks", path)
    x = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(x, fx.Node):
        return Refusal(node, form, "the input is not computed in the graph", path)
    n, k = module.weight.shape
    bias = None if module.bias is None else node
    return LinearMatch(node, form, path, f"{path}.weight", x, None, path, True, bias, 1, 1, _rows(fake(x)), k, n, module.weight)


def match_node(
    node: fx.Node, gm: fx.GraphModule, constants: set[fx.Node], computed: Set[fx.Node] = frozenset()
) -> LinearMatch | Refusal | None:
    """What the node is: a linear, a matmul that is none (with the reason), or no matmul at all (None).

    `constants` and `computed` are `graph`'s; the nodes' values, where known, are in their meta (`graph.propagate`).
    """
    if node.op == "call_module":
        return _match_module(node, gm)
    table: dict[Any, tuple[str, tuple[str, ...]]] = {"call_function": _FUNCTIONS, "call_method": _METHODS}.get(node.op, {})  # type: ignore[assignment]
    if node.target not in table:
        return None
    form, names = table[node.target]
    path = module_path(node)
    arguments = _bind(node, names)
    if arguments is None:
        return Refusal(node, form, f"called with other arguments than {', '.join(names)}", path)

    left = arguments["mat1"] if "mat1" in arguments else arguments.get("input")
    transposed = names is _LINEAR
    right = arguments.get("weight") if transposed else arguments.get("mat2")
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return Refusal(node, form, "an operand is not computed in the graph", path)
    x, w = fake(left), fake(right)
    m = _rows(x)
    k = None if w is None or w.dim() < 2 else w.shape[-1 if transposed else -2]
    n = None if w is None or w.dim() < 2 else w.shape[-2 if transposed else -1]

    def refuse(reason: str, name: str = "") -> Refusal:
        return Refusal(node, form, reason, path, name, m, k, n)

    root = _weight_behind(right, constants)
    if root is None:
        if _weight_behind(left, constants) is not None:
            return refuse("the weight is on the left", name_of(_weight_behind(left, constants)))  # type: ignore[arg-type]
        if transposed or right in computed:
            return refuse(_COMPUTED)
        return refuse("activation times activation")
    name = name_of(root)
    if w is None or k is None or n is None or w.dim() != 2:
        return refuse(f"the weight is {'?' if w is None else w.dim()}-D, not 2-D", name)
    if not isinstance(k, int) or not isinstance(n, int):
        return refuse(f"the weight's shape ({k}, {n}) is symbolic", name)
    # In linear's own arguments the addend is `bias`; in addmm's it is `input`.
    bias = arguments.get("bias") if transposed else arguments.get("input") if "mat1" in arguments else None
    alpha, beta = arguments.get("alpha", 1), arguments.get("beta", 1)
    if isinstance(alpha, fx.Node) or isinstance(beta, fx.Node):
        return refuse("alpha or beta is computed in the graph", name)
    if bias is not None and not isinstance(bias, fx.Node):
        return refuse("the addend is not computed in the graph", name)
    return LinearMatch(node, form, path, name, left, right, None, transposed, bias, alpha, beta, m, k, n, w)
