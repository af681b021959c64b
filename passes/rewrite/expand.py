"""expand: a fused call that hides linears -> the calls that it is made of, where `match` sees them.

    F.multi_head_attention_forward(q, k, v, ..., W_in, b_in, ...)  -> linear(q, W_in, b_in); ...; softmax; ...; linear(y, W_out, b_out)
    _transformer_encoder_layer_fwd(x, ...)                         -> layer_norm; the above; linear; gelu; linear

torch itself runs the first as these calls. The second is the fast path of nn.TransformerEncoderLayer in eval mode without gradients; the
calls compute the same in their own order of summation.
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

__all__ = ["CHANGES", "NEEDS", "run"]

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
    """The arguments are the operator's own.

    `src` (B, L, E); `mask` is True where nothing is looked at, or added to the scores: (B, L) for keys if `mask_type` is 1, else
    (B, heads, L, L).
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


_CALLS: dict[str, Callable[..., Any]] = {
    "multi_head_attention_forward": F.multi_head_attention_forward,
    "_transformer_encoder_layer_fwd": _encoder_layer,
}


def _expand(node: fx.Node, calls: Callable[..., Any]) -> bool:
    """Puts the calls in place of the node; whether it could."""
    flat, spec = pytree.tree_flatten((node.args, node.kwargs))
    nodes = [x for x in flat if isinstance(x, fx.Node)]
    known = [value(x) for x in nodes]
    if any(x is UNKNOWN for x in known):
        return False

    def call(*given: Any) -> Any:
        rest = iter(given)
        args, kwargs = pytree.tree_unflatten([next(rest) if isinstance(x, fx.Node) else x for x in flat], spec)
        return calls(*args, **kwargs)

    with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):  # the calls meet it when they run
        inside = make_fx(call, pre_dispatch=True, _allow_non_fake_inputs=True)(*known)
    if inside.graph.find_nodes(op="get_attr"):
        return False
    provenance = {
        key: x for key, x in node.meta.items() if key in ("nn_module_stack", "stack_trace", "source_fn_stack")
    }
    with node.graph.inserting_before(node):
        new = dict(zip(inside.graph.find_nodes(op="placeholder"), nodes, strict=True))
        for one in inside.graph.nodes:
            if one.op.startswith("call_"):
                new[one] = node.graph.node_copy(one, new.__getitem__)
                new[one].meta |= provenance
        found: Any = fx.map_arg(inside.graph.output_node().args[0], new.__getitem__)
    if isinstance(found, fx.Node):
        node.replace_all_uses_with(found)
    for user in list(node.users):  # one that takes one of several results, or all of them
        if user.target is operator.getitem:
            user.replace_all_uses_with(found[user.args[1]])
            node.graph.erase_node(user)
        else:
            args: Any = map_aggregate(user.args, lambda a: found if a is node else a)
            kwargs: Any = map_aggregate(user.kwargs, lambda a: found if a is node else a)
            user.args = args
            user.kwargs = kwargs
    node.graph.erase_node(node)
    return True


def _is_opened(node: fx.Node) -> bool:
    form = form_of(node)
    return form is not None and form.opened_by_expand


def run(rewrite: Rewrite) -> int:
    """Expands every fused call whose operands' shapes are known; returns how many."""
    fused = [node for node in rewrite.gm.graph.nodes if _is_opened(node)]
    if not fused or rewrite.config.profit == "never":
        return 0
    return sum(_expand(node, _CALLS[called(node)]) for node in fused)
