"""How a matmul can be written, as tables by the operator's name: its arguments' names, and what leaves a weight a weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from fp8fx.graph import fake
from fp8fx.operators import called, copies_first, views_first

__all__ = [
    "ADDMM",
    "CONTRACTIONS",
    "CONVOLUTION",
    "CONVOLUTIONS",
    "CONVOLUTION_MODULES",
    "FUSED",
    "GROUPED",
    "GROUPED_ARGUMENTS",
    "GROUPED_FALLBACK",
    "LEFT_ALONE",
    "LINEAR",
    "MATMULS",
    "OPAQUE",
    "TENSORDOT_OPERATOR",
    "bind",
    "first_argument",
    "is_called_view",
    "is_cast",
    "is_gather",
    "is_view",
]

# What a matmul's arguments are called, in order. The right operand is (K, N), but for linear's weight (N, K).
LINEAR = ("input", "weight", "bias")
ADDMM = ("input", "mat1", "mat2", "beta", "alpha")
_MATMUL = ("input", "mat2")
_BADDBMM = ("input", "batch1", "batch2", "beta", "alpha")
_ADDMV = ("input", "mat", "vec", "beta", "alpha")

MATMULS: dict[str, tuple[str, ...]] = {
    "linear": LINEAR,
    "addmm": ADDMM,
    "addmm_": ADDMM,
    "mm": _MATMUL,
    "matmul": _MATMUL,
    "rmatmul": _MATMUL[::-1],
    "bmm": _MATMUL,
    "mv": _MATMUL,
    "addmv": _ADDMV,
    "addmv_": _ADDMV,
    "baddbmm": _BADDBMM,
    "baddbmm_": _BADDBMM,
    "addbmm": _BADDBMM,
    "addbmm_": _BADDBMM,
}
"""The arguments of each operator that multiplies two matrices, by its name (`operators.called`)."""

_Reader = Callable[[dict[str, Any]], tuple[Any, Any]]


def _tensordot(arguments: dict[str, Any]) -> tuple[Any, Any]:
    # The operator has the dimensions apart, the function together.
    apart = (arguments["dims_self"], arguments["dims_other"]) if "dims_self" in arguments else None
    return (arguments["a"], arguments["b"]), apart or arguments.get("dims", 2)


CONTRACTIONS: dict[str, tuple[tuple[str, ...], _Reader]] = {
    "einsum": (("equation", "operands", "path"), lambda a: (a["operands"], a["equation"])),
    "tensordot": (("a", "b", "dims", "out"), _tensordot),
    "inner": (_MATMUL, lambda a: ((a["input"], a["mat2"]), ((-1,), (-1,)))),
}
"""By the operator's name its arguments, and how to read from them the operands and what is contracted."""

TENSORDOT_OPERATOR = ("a", "b", "dims_self", "dims_other")
CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
CONVOLUTION_MODULES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")

GROUPED = "grouped_mm"
"""Rows sorted by experts, each times its own expert's weight."""
GROUPED_ARGUMENTS = ("input", "mat2", "offs", "bias", "out_dtype")
GROUPED_FALLBACK = "transformers.grouped_mm_fallback"
"""What transformers calls instead, by its name, where torch has no kernel: a loop over the experts in high precision."""
_ALIASES = {"mat_a": "input", "mat_b": "mat2", "other": "mat2", "self": "input", "tensor2": "mat2", "vec": "mat2"}
_SYNONYMS = {"batch1": "mat1", "batch2": "mat2", "mat": "mat1", "vec": "mat2"}

FUSED = ("multi_head_attention_forward", "_transformer_encoder_layer_fwd")
"""Calls that hide linears, which the pass `expand` opens where it can."""

_CELLS = ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
_LAYERS = ("lstm", "gru", "rnn_tanh", "rnn_relu", "_cudnn_rnn", "mkldnn_rnn_layer")
_CLOSED = (*_CELLS, *_LAYERS, "_native_multi_head_attention", "_addmm_activation")
LEFT_ALONE: dict[str, str] = {
    **dict.fromkeys(_CLOSED, "a fused call that hides its linears"),
    **dict.fromkeys(("bilinear", "_trilinear"), "each product is of two inputs and a weight"),
    **dict.fromkeys(("linalg_multi_dot", "chain_matmul"), "a chain of matmuls, whose order torch chooses"),
}
"""Calls that compute with weights and are never rewritten, and why."""

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


def is_view(node: fx.Node) -> bool:
    """Whether the node is a view of its one input, or a copy of it that changes no value."""
    return len(node.all_input_nodes) == 1 and is_called_view(node)  # else gathered or sliced by what another node computes


def is_called_view(node: fx.Node) -> bool:
    """Whether what the node calls gives a view of its first argument, or a copy of it that changes no value."""
    seen = isinstance(first_argument(node), fx.Node) and called(node) not in _CASTS | _OF_MEMORY
    return seen and (views_first(node) or copies_first(node))


def first_argument(node: fx.Node) -> Any:
    """What a call is given first, by position or as `input` or `self`."""
    return node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))


_OF_MEMORY = {"as_strided"}  # which values it sees depends on how the weight lies
_CASTS = {"to", "type", "type_as", "half", "bfloat16", "_to_copy", "convert_element_type"}


def is_cast(node: fx.Node) -> bool:
    """Whether the node casts its first argument down to a 16-bit dtype: what is multiplied is no more exact.

    A cast to float32 is meant.
    """
    if called(node) not in _CASTS:
        return False
    known, source = fake(node), first_argument(node)
    before = fake(source) if isinstance(source, fx.Node) else None
    if known is None or before is None or not before.dtype.is_floating_point or before.dtype.itemsize < 2:
        return False  # integers times a scale are a quantization of their own
    return known.dtype in (torch.float16, torch.bfloat16)


def is_gather(node: fx.Node) -> bool:
    """Whether the node takes rows or columns of its first argument by an index tensor, otherwise than by getitem."""
    return called(node) in ("index", "index_select")
