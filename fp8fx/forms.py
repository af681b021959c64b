"""How a matmul can be written, as tables: what is called, the names of its arguments, and what leaves a weight a weight."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fp8fx.graph import fake

__all__ = [
    "ADDMM",
    "CONTRACTIONS",
    "CONVOLUTION",
    "CONVOLUTIONS",
    "FUNCTIONS",
    "FUSED",
    "GROUPED",
    "GROUPED_ARGUMENTS",
    "GROUPED_FALLBACK",
    "LEFT_ALONE",
    "LINEAR",
    "METHODS",
    "OPAQUE",
    "bind",
    "is_called_view",
    "is_cast",
    "is_gather",
    "is_view",
]

aten = torch.ops.aten

# What a matmul's arguments are called, in order. The right operand is (K, N), but for linear's weight (N, K).
LINEAR = ("input", "weight", "bias")
ADDMM = ("input", "mat1", "mat2", "beta", "alpha")
_MATMUL = ("input", "mat2")
_BADDBMM = ("input", "batch1", "batch2", "beta", "alpha")
_ADDMV = ("input", "mat", "vec", "beta", "alpha")

FUNCTIONS: dict[Callable[..., Any], tuple[str, tuple[str, ...]]] = {
    F.linear: ("F.linear", LINEAR),
    aten.linear.default: ("aten.linear", LINEAR),
    torch.addmm: ("addmm", ADDMM),
    aten.addmm.default: ("aten.addmm", ADDMM),
    torch.mm: ("mm", _MATMUL),
    aten.mm.default: ("aten.mm", _MATMUL),
    torch.matmul: ("matmul", _MATMUL),
    aten.matmul.default: ("aten.matmul", _MATMUL),
    operator.matmul: ("@", _MATMUL),
    operator.imatmul: ("@=", _MATMUL),  # tensors have none of their own: `x @= w` is `x = x @ w`
    torch.bmm: ("bmm", _MATMUL),
    aten.bmm.default: ("aten.bmm", _MATMUL),
    torch.mv: ("mv", _MATMUL),
    aten.mv.default: ("aten.mv", _MATMUL),
    torch.linalg.matmul: ("linalg.matmul", _MATMUL),
    aten.linalg_matmul.default: ("aten.linalg_matmul", _MATMUL),
    torch.addmv: ("addmv", _ADDMV),
    aten.addmv.default: ("aten.addmv", _ADDMV),
    torch.baddbmm: ("baddbmm", _BADDBMM),
    aten.baddbmm.default: ("aten.baddbmm", _BADDBMM),
    torch.addbmm: ("addbmm", _BADDBMM),
    aten.addbmm.default: ("aten.addbmm", _BADDBMM),
    aten.addmm_.default: ("aten.addmm_", ADDMM),
    aten.addmv_.default: ("aten.addmv_", _ADDMV),
    aten.baddbmm_.default: ("aten.baddbmm_", _BADDBMM),
    aten.addbmm_.default: ("aten.addbmm_", _BADDBMM),
}
METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "addmm": (".addmm", ADDMM),
    "mm": (".mm", _MATMUL),
    "matmul": (".matmul", _MATMUL),
    "__matmul__": ("@", _MATMUL),
    "__rmatmul__": ("@", _MATMUL[::-1]),
    "bmm": (".bmm", _MATMUL),
    "mv": (".mv", _MATMUL),
    "addmv": (".addmv", _ADDMV),
    "baddbmm": (".baddbmm", _BADDBMM),
    "addbmm": (".addbmm", _BADDBMM),
    "addmm_": (".addmm_", ADDMM),
    "addmv_": (".addmv_", _ADDMV),
    "baddbmm_": (".baddbmm_", _BADDBMM),
    "addbmm_": (".addbmm_", _BADDBMM),
}
CONTRACTIONS: dict[Any, tuple[str, tuple[str, ...], Callable[[dict[str, Any]], tuple[Any, Any]]]] = {
    torch.functional.einsum: ("einsum", ("equation", "operands"), lambda a: (a["operands"], a["equation"])),
    aten.einsum.default: ("aten.einsum", ("equation", "operands", "path"), lambda a: (a["operands"], a["equation"])),
    torch.functional.tensordot: ("tensordot", ("a", "b", "dims", "out"), lambda a: ((a["a"], a["b"]), a.get("dims", 2))),
    aten.tensordot.default: (
        "aten.tensordot",
        ("a", "b", "dims_self", "dims_other"),
        lambda a: ((a["a"], a["b"]), (a["dims_self"], a["dims_other"])),
    ),
    **{
        target: (form, _MATMUL, lambda a: ((a["input"], a["mat2"]), ((-1,), (-1,))))
        for target, form in ((torch.inner, "inner"), ("inner", ".inner"), (aten.inner.default, "aten.inner"))
    },
}
CONVOLUTIONS: dict[Any, str] = {
    target: name
    for dims in "123"
    for name, target in ((f"conv{dims}d", getattr(torch, f"conv{dims}d")), (f"aten.conv{dims}d", getattr(aten, f"conv{dims}d").default))
}
CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
GROUPED: dict[Any, str] = {
    F.grouped_mm: "grouped_mm",
    torch._grouped_mm: "grouped_mm",
    aten._grouped_mm.default: "aten._grouped_mm",
}
"""Rows sorted by experts, each times its own expert's weight."""


def _add_overloads(table: dict[Any, Any]) -> None:
    """An operator that is called without naming its overload, and the one that writes into `out`, which is refused for that argument."""
    for target, form in list(table.items()):
        if isinstance(target, torch._ops.OpOverload):
            packet = target.overloadpacket
            table |= {packet: form} | ({packet.out: form} if "out" in packet.overloads() else {})


for _table in (FUNCTIONS, CONTRACTIONS, CONVOLUTIONS, GROUPED):
    _add_overloads(_table)

GROUPED_ARGUMENTS = ("input", "mat2", "offs", "bias", "out_dtype")
GROUPED_FALLBACK = "transformers.grouped_mm_fallback"
"""What transformers calls instead, by its name, where torch has no kernel: a loop over the experts in high precision."""
_ALIASES = {"mat_a": "input", "mat_b": "mat2", "other": "mat2", "self": "input", "tensor2": "mat2", "vec": "mat2"}
_SYNONYMS = {"batch1": "mat1", "batch2": "mat2", "mat": "mat1", "vec": "mat2"}

FUSED: dict[Any, str] = {
    F.multi_head_attention_forward: "multi_head_attention_forward",
    torch._transformer_encoder_layer_fwd: "_transformer_encoder_layer_fwd",
    aten._transformer_encoder_layer_fwd.default: "_transformer_encoder_layer_fwd",
}
"""Calls that hide linears, which the pass `expand` opens where it can."""


def _calls(names: tuple[str, ...]) -> dict[Any, str]:
    """The functions of torch and of ATen of these names, with their names."""
    found: dict[Any, str] = {}
    for name in names:
        packet = getattr(aten, name, None)
        if packet is None:  # not every build has all of them
            continue
        found |= dict.fromkeys((getattr(packet, overload) for overload in packet.overloads()), name)
        if hasattr(torch, name):
            found[getattr(torch, name)] = name
    return found


_CELLS = ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
_CLOSED = ("lstm", "gru", "rnn_tanh", "rnn_relu", "_cudnn_rnn", "mkldnn_rnn_layer", "_native_multi_head_attention", "_addmm_activation")
LEFT_ALONE: dict[Any, tuple[str, str]] = {
    **{target: (name, "a fused call that hides its linears") for target, name in _calls(_CELLS + _CLOSED).items()},
    **{target: (name, "each product is of two inputs and a weight") for target, name in _calls(("bilinear", "_trilinear")).items()},
    **{
        target: (name.removeprefix("linalg_"), "a chain of matmuls, whose order torch chooses")
        for target, name in {torch.linalg.multi_dot: "multi_dot", **_calls(("linalg_multi_dot", "chain_matmul"))}.items()
    },
}
"""Calls that compute with weights and are never rewritten: the name of each, and why."""

OPAQUE: tuple[type[nn.Module], ...] = (
    *(nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, nn.Bilinear, nn.Transformer),
    *(nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.TransformerDecoder, nn.TransformerDecoderLayer),
)
"""Modules with linears that symbolic_trace does not look into."""


def bind(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any] | None:
    """The call's arguments by name; None if it has others than `names`."""
    bound = dict(zip(names, node.args, strict=False))
    for key, argument in node.kwargs.items():
        bound[key if key in names else _ALIASES.get(key, key)] = argument
    if len(node.args) > len(names) or not set(bound) <= set(names):
        return None
    return {_SYNONYMS.get(name, name): argument for name, argument in bound.items()}


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


_CASTS = {"to", "type", "type_as", "half", "bfloat16"}
_CAST_TARGETS = {aten.to, aten._to_copy, aten.type_as, torch.ops.prims.convert_element_type}
_GATHERS = {aten.index, aten.index_select}


def is_cast(node: fx.Node) -> bool:
    """Whether the node casts its first argument down to a 16-bit dtype: what is multiplied is no more exact. A cast to float32 is meant."""
    named = node.op == "call_method" and node.target in _CASTS
    if not named and getattr(node.target, "overloadpacket", None) not in _CAST_TARGETS:
        return False
    known, source = fake(node), node.args[0] if node.args else None
    before = fake(source) if isinstance(source, fx.Node) else None
    if known is None or before is None or not before.dtype.is_floating_point or before.dtype.itemsize < 2:
        return False  # integers times a scale are a quantization of their own
    return known.dtype in (torch.float16, torch.bfloat16)


def is_gather(node: fx.Node) -> bool:
    """Whether the node takes rows or columns of its first argument by an index tensor, otherwise than by getitem."""
    if node.op == "call_method":
        return node.target == "index_select"
    return node.target is torch.index_select or getattr(node.target, "overloadpacket", None) in _GATHERS
