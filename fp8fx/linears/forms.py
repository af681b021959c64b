"""Every way to write a linear, as one table. A new way is one more `Form` in it.

`match` looks up what a node calls, and hands the form to the matcher of its family. What a form has of its own is a
field of `Form`: no code asks for a form's name.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from fp8fx.graph.operators import called, is_operator
from fp8fx.linears.form import Family, Form
from fp8fx.reasons import CallReason, Reason

__all__ = ["FORMS", "OPAQUE", "form_of", "form_of_module"]


def _read_einsum(arguments: dict[str, Any]) -> tuple[Any, Any]:
    return arguments["operands"], arguments["equation"]


def _read_tensordot(arguments: dict[str, Any]) -> tuple[Any, Any]:
    operands = arguments["a"], arguments["b"]
    if "dims_self" in arguments:  # the operator has the dimensions apart, the function together
        return operands, (arguments["dims_self"], arguments["dims_other"])
    return operands, arguments.get("dims", 2)


def _read_inner(arguments: dict[str, Any]) -> tuple[Any, Any]:
    return (arguments["input"], arguments["mat2"]), ((-1,), (-1,))


def _matmul(operator: str, **fields: Any) -> Form:
    """A product of two operands and nothing added."""
    defaults = {"arguments": ("input", "mat2"), "may_have_weight_on_the_left": True}
    return Form(operator=operator, family=Family.MATMUL, **{**defaults, **fields})


def _sum(operator: str, left: str, right: str, **fields: Any) -> Form:
    """beta * input + alpha * (left @ right)."""
    arguments = ("input", left, right, "beta", "alpha")
    return Form(
        operator=operator, family=Family.MATMUL, arguments=arguments, left=left, right=right, addend="input", **fields
    )


def _convolution(operator: str, module: type[nn.Module], **fields: Any) -> Form:
    arguments = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    return Form(
        operator=operator,
        family=Family.CONVOLUTION,
        arguments=arguments,
        right="weight",
        addend="bias",
        names_its_weight=True,
        module=module,
        **fields,
    )


def _left_alone(why: Reason, *operators: str, **fields: Any) -> tuple[Form, ...]:
    """Calls that compute with weights and are never rewritten."""
    return tuple(
        Form(operator=operator, family=Family.LEFT_ALONE, why_left_alone=why, **fields) for operator in operators
    )


_FORMS: tuple[Form, ...] = (
    Form(
        operator="linear",
        family=Family.MATMUL,
        example="F.linear({x}, {w}, {b})",
        example_dims=3,
        arguments=("input", "weight", "bias"),
        right="weight",
        addend="bias",
        is_transposed=True,
        is_layer=True,
        names_its_weight=True,
        module=nn.Linear,
    ),
    _sum("addmm", "mat1", "mat2", names_its_weight=True, example="torch.addmm({b}, {x}, {v})"),
    _sum("addmm_", "mat1", "mat2", names_its_weight=True, in_place=True, example="({c} + 1).addmm_({x}, {v})"),
    _matmul("mm", example="torch.mm({x}, {v})"),
    _matmul("matmul", example="{x} @ {v}", example_dims=3),
    _matmul("rmatmul", arguments=("mat2", "input"), example="torch.Tensor.__rmatmul__({v}, {x})", example_dims=3),
    _matmul("bmm", example="torch.bmm({x}[None], {v}[None])"),
    _matmul("mv", casts_under_autocast=False, example="torch.mv({w}, {x})", example_dims=1),
    _sum(
        "addmv",
        "mat",
        "vec",
        may_have_weight_on_the_left=True,
        casts_under_autocast=False,
        example="torch.addmv({b}, {w}, {x})",
        example_dims=1,
    ),
    _sum(
        "addmv_",
        "mat",
        "vec",
        may_have_weight_on_the_left=True,
        casts_under_autocast=False,
        in_place=True,
        example="({b} + 1).addmv_({w}, {x})",
        example_dims=1,
    ),
    _sum("baddbmm", "batch1", "batch2", example="torch.baddbmm({b}, {x}[None], {v}[None])"),
    _sum(
        "baddbmm_",
        "batch1",
        "batch2",
        in_place=True,
        example="({c} + 1)[None].baddbmm_({x}[None], {v}[None])",
    ),
    _sum("addbmm", "batch1", "batch2", sums_batch=True, example="torch.addbmm({c}, {x}[None], {v}[None])"),
    _sum(
        "addbmm_",
        "batch1",
        "batch2",
        sums_batch=True,
        in_place=True,
        example="({c} + 1).addbmm_({x}[None], {v}[None])",
    ),
    Form(
        operator="einsum",
        family=Family.CONTRACTION,
        example="torch.einsum('bk,nk->bn', {x}, {w})",
        arguments=("equation", "operands", "path"),
        spreads_operands=True,
        read_contraction=_read_einsum,
    ),
    Form(
        operator="tensordot",
        family=Family.CONTRACTION,
        example="torch.tensordot({x}, {v}, 1)",
        arguments=("a", "b", "dims", "out"),
        operator_arguments=("a", "b", "dims_self", "dims_other"),
        read_contraction=_read_tensordot,
    ),
    Form(
        operator="inner",
        family=Family.CONTRACTION,
        example="torch.inner({x}, {w})",
        arguments=("input", "mat2"),
        needs_a_matrix=True,
        read_contraction=_read_inner,
    ),
    _convolution("conv1d", nn.Conv1d, example="F.conv1d({x}.mT, {w}.unsqueeze(-1), {b})", example_dims=3),
    _convolution("conv2d", nn.Conv2d, example="F.conv2d({x}.movedim(-1, 1), {w}[:, :, None, None])", example_dims=4),
    _convolution(
        "conv3d",
        nn.Conv3d,
        example="F.conv3d({x}.movedim(-1, 1)[..., None], {w}[:, :, None, None, None])",
        example_dims=4,
    ),
    Form(
        operator="grouped_mm",
        family=Family.GROUPED,
        example="F.grouped_mm({x}, {v}, offs={o})",
        arguments=("input", "mat2", "offs", "bias", "out_dtype"),
    ),
    # What transformers calls instead where torch has no kernel: a loop over the experts in high precision.
    *_left_alone(CallReason.GROUPED_FALLBACK, "transformers.grouped_mm_fallback"),
    *_left_alone(
        CallReason.FUSED_OF_UNKNOWN,
        "multi_head_attention_forward",
        "_transformer_encoder_layer_fwd",
        opened_by_expand=True,
    ),
    *_left_alone(
        CallReason.FUSED,
        *("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"),
        *("lstm", "gru", "rnn_tanh", "rnn_relu", "_cudnn_rnn", "mkldnn_rnn_layer"),
        *("_native_multi_head_attention", "_addmm_activation"),
    ),
    *_left_alone(CallReason.BILINEAR, "bilinear", "_trilinear"),
    *_left_alone(CallReason.CHAIN, "linalg_multi_dot", "chain_matmul"),
)


FORMS: dict[str, Form] = {form.operator: form for form in _FORMS}
"""Every form, by its operator's name."""


_BY_MODULE = {form.module: form for form in _FORMS if form.module is not None}


OPAQUE: tuple[type[nn.Module], ...] = (
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.Bilinear,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
)
"""Modules with linears that symbolic_trace does not look into."""


def form_of(node: fx.Node) -> Form | None:
    """The form that a call of a function, method or operator is; None for any other node."""
    operator = called(node)
    if not operator and is_operator(node.target):  # of another library, by its full name without the overload
        operator = ".".join(str(node.target).split(".")[:2])
    return FORMS.get(operator)


def form_of_module(module: nn.Module) -> Form | None:
    """The form that a call of this module is, of a class of torch's or one derived from it; None for any other."""
    return next((form for kind, form in _BY_MODULE.items() if isinstance(module, kind)), None)
