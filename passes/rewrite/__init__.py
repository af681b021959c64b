"""The passes over the captured graph, in the order in which they run."""

from __future__ import annotations

from fp8fx.passes.rewrite import causal, check, decide, expand, freeze, match, merge, replace, unwrap
from fp8fx.pipeline import Pass

__all__ = ["PIPELINE"]

PIPELINE: tuple[Pass, ...] = (
    expand,  # a fused call that hides linears -> the calls that it is made of
    causal,  # attention with a causal mask -> attention that needs no mask
    match,  # every matmul: a linear, or a refusal with its reason
    check,  # is it legal?
    decide,  # does the user want it, and is it worth it?
    replace,  # a linear -> an FP8 op
    merge,  # siblings whose weights are FP8, or will be -> one op
    freeze,  # with freeze: its weight, quantized now
    unwrap,  # an FP8 weight of the model -> its data and scale
)
