"""causal: attention with a mask that hides just the later keys from each query -> attention that needs no mask.

    scaled_dot_product_attention(q, k, v, mask) -> scaled_dot_product_attention(q, k, v, is_causal=True)

So that the kernels skip what is hidden: with an explicit mask they compute all of it. transformers makes such a mask in
every graph that is traced. A mask that hides nothing is left out, too. What is proved, and how: `fp8fx.graph.masks`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fp8fx.graph.masks import Hidden, MaskedAttention, Masks, inner_graphs
from fp8fx.graph.names import MASK, module_path
from fp8fx.graph.operators import called
from fp8fx.graph.values import fake, value
from fp8fx.pipeline import Rewrite
from fp8fx.reasons import Because, MaskReason
from fp8fx.torch_internals import HigherOrderOperator

__all__ = ["CHANGES", "NEEDS", "run"]

NEEDS: tuple[str, ...] = ("shapes", "constants", "writes")
CHANGES = True

_ATTENTION = "scaled_dot_product_attention"
_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def _arguments(attention: fx.Node) -> dict[str, Any]:
    """A call's arguments by name."""
    return {**dict(zip(_ARGUMENTS, attention.args, strict=False)), **attention.kwargs}


def _without_mask(attention: fx.Node, is_causal: bool) -> None:
    """Takes the mask from the call, and the nodes that made it if nothing else reads them.

    What gives a symbolic size is left: it may be computed of anything.
    """
    given = _arguments(attention)
    mask = given["attn_mask"]
    attention.args = ()
    attention.kwargs = {**given, "attn_mask": None, "is_causal": is_causal}
    unused = {mask: None}  # in order, each once
    while unused:
        node, _ = unused.popitem()
        is_size = isinstance(value(node), torch.SymInt)
        if not node.users and node.op.startswith("call_") and not is_size:
            unused |= dict.fromkeys(node.all_input_nodes)
            node.graph.erase_node(node)


def _verdict(attention: fx.Node, masks: Masks, leave: Because | None) -> MaskedAttention:
    """What a call's mask hides, or why it stays: `leave` if there is such a reason for all."""
    mask = _arguments(attention)["attn_mask"]
    x = fake(mask)
    shape = "?" if x is None else " x ".join(map(str, x.shape))
    return MaskedAttention(module_path(attention), shape, leave or masks.of(mask))


def _is_masked(node: fx.Node) -> bool:
    return called(node) == _ATTENTION and isinstance(_arguments(node).get("attn_mask"), fx.Node)


def _has_masks(body: fx.GraphModule) -> bool:
    """Whether a call of attention in the body, or in one inside it, has a mask."""
    graphs = [part.graph for part in body.modules() if isinstance(part, fx.GraphModule)]
    return any(_is_masked(node) for graph in graphs for node in graph.nodes)


def _mark(call: fx.Node, masks: Masks) -> None:
    """Tells the masks that a higher-order operator hands to its body what they hide."""
    for operand in call.all_input_nodes:
        x = fake(operand)
        if x is not None and x.dim() >= 2 and (x.dtype == torch.bool or x.is_floating_point()):
            operand.meta[MASK] = masks.of(operand)


def run(rewrite: Rewrite) -> int:
    """Takes the mask from each attention that can do without; returns from how many."""
    nodes = list(rewrite.gm.graph.nodes)
    masked = [node for node in nodes if _is_masked(node)]
    operators = [node for node in nodes if isinstance(node.target, HigherOrderOperator)]
    calls = [node for node in operators if any(map(_has_masks, inner_graphs(rewrite.gm, node)))]
    if not masked and not calls:
        return 0
    masks = Masks(rewrite.gm, rewrite.facts.constants, rewrite.facts.writes)
    leave = MaskReason.OPTION() if rewrite.config.attention == "leave" else None
    verdicts = [_verdict(node, masks, leave) for node in masked]
    for call in calls if leave is None else ():
        _mark(call, masks)
    rewrite.attention = verdicts
    changed = [(node, verdict.hidden) for node, verdict in zip(masked, verdicts, strict=True) if verdict.became]
    for node, hidden in changed:
        _without_mask(node, hidden is Hidden.LATER_KEYS)
    return len(changed)
