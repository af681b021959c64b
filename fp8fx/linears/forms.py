"""How a matmul can be written, as tables by the operator's name: its arguments' names, and what leaves a weight a weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn

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
