"""expand: a fused call that hides linears -> the calls that it is made of, where `match` sees them.

    F.multi_head_attention_forward(q, k, v, ..., W_in, b_in, ...)
        -> linear(q, W_in, b_in); ...; softmax; ...; linear(y, W_out, b_out)
    _transformer_encoder_layer_fwd(x, ...)
        -> layer_norm; the above; linear; gelu; linear

torch itself runs the first as these calls. The second is the fast path of nn.TransformerEncoderLayer in eval mode
without gradients. The calls compute the same in their own order of summation.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from fp8fx.graph.operators import called
from fp8fx.graph.values import UNKNOWN, value
from fp8fx.linears.forms import form_of
from fp8fx.pipeline import Rewrite
from fp8fx.torch_internals import make_fx, pytree

__all__ = ["CALLS", "CHANGES", "NEEDS", "run"]

NEEDS: tuple[str, ...] = ("shapes",)
CHANGES = True


def _encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """One layer of an encoder, (B, L, E) -> (B, L, E). The arguments are the operator's own.

    `mask` is True at what is not looked at, or is added to the scores. It is (B, L), for keys, if `mask_type` is 1;
    otherwise (B, heads, L, L).
    """
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=src.dtype).masked_fill(mask, -torch.inf)
    scores = mask[:, None, None, :] if mask is not None and mask_type == 1 else mask

    def attention(x: Tensor) -> Tensor:
        q, k, v = (
            F.linear(x, qkv_weight, qkv_bias)
            .unflatten(-1, (3, num_heads, embed_dim // num_heads))
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        y = F.scaled_dot_product_attention(q, k, v, scores)
        return F.linear(y.transpose(1, 2).flatten(2), proj_weight, proj_bias)

    def norm_1(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def norm_2(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    def feed_forward(x: Tensor) -> Tensor:
        h = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(h) if use_gelu else F.relu(h), ffn_weight_2, ffn_bias_2)

    if norm_first:
        src = src + attention(norm_1(src))
        return src + feed_forward(norm_2(src))
    src = norm_1(src + attention(src))
    return norm_2(src + feed_forward(src))


CALLS: dict[str, Callable[..., Any]] = {
    "multi_head_attention_forward": F.multi_head_attention_forward,
    "_transformer_encoder_layer_fwd": _encoder_layer,
}
"""By the operator's name, a function that is made of the calls."""


def _trace(function: Callable[..., Any], flat: list[Any], spec: Any) -> fx.Graph | None:
    """The calls that `function` makes of the node's arguments; its placeholders are the nodes among `flat`, in order.

    None if a value is not known, or the calls use a tensor of their own.
    """
    values = [value(argument) for argument in flat if isinstance(argument, fx.Node)]
    if any(tensor is UNKNOWN for tensor in values):
        return None

    def call(*tensors: Any) -> Any:
        rest = iter(tensors)
        leaves = [next(rest) if isinstance(argument, fx.Node) else argument for argument in flat]
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        return function(*args, **kwargs)

    # The calls meet the caller's autocast when they run.
    with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
        graph = make_fx(call, pre_dispatch=True, _allow_non_fake_inputs=True)(*values).graph
    return None if graph.find_nodes(op="get_attr") else graph


def _copy_calls(calls: fx.Graph, node: fx.Node, inputs: list[fx.Node]) -> Any:
    """Copies the calls in front of the node; returns their result, a node or a tuple of nodes."""
    provenance = {
        key: entry for key, entry in node.meta.items() if key in ("nn_module_stack", "stack_trace", "source_fn_stack")
    }
    copies = dict(zip(calls.find_nodes(op="placeholder"), inputs, strict=True))
    with node.graph.inserting_before(node):
        for call in calls.nodes:
            if call.op.startswith("call_"):
                copies[call] = node.graph.node_copy(call, copies.__getitem__)
                copies[call].meta |= provenance
    result: Any = calls.output_node().args[0]
    return fx.map_arg(result, copies.__getitem__)


def _replace_uses(node: fx.Node, result: Any) -> None:
    """Hands the node's users the result, or the part of it that they take."""
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
    for user in list(node.users):
        if user.target is operator.getitem:
            user.replace_all_uses_with(result[user.args[1]])
            node.graph.erase_node(user)
        else:
            args: Any = map_aggregate(user.args, lambda argument: result if argument is node else argument)
            kwargs: Any = map_aggregate(user.kwargs, lambda argument: result if argument is node else argument)
            user.args = args
            user.kwargs = kwargs


def _expand(node: fx.Node, function: Callable[..., Any]) -> bool:
    """Puts the calls that `function` makes in place of the node; whether it could."""
    flat, spec = pytree.tree_flatten((node.args, node.kwargs))
    calls = _trace(function, flat, spec)
    if calls is None:
        return False
    inputs = [argument for argument in flat if isinstance(argument, fx.Node)]
    _replace_uses(node, _copy_calls(calls, node, inputs))
    node.graph.erase_node(node)
    return True


def _is_fused(node: fx.Node) -> bool:
    form = form_of(node)
    return form is not None and form.opened_by_expand


def run(rewrite: Rewrite) -> int:
    """Expands every fused call whose operands' shapes are known; returns how many."""
    fused = [node for node in rewrite.gm.graph.nodes if _is_fused(node)]
    if not fused or rewrite.config.profit == "never":
        return 0
    return sum(_expand(node, CALLS[called(node)]) for node in fused)
