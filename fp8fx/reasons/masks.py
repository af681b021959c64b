"""Reasons why an attention mask stays: it is not known to be one that attention can do without."""

from __future__ import annotations

from enum import unique

from fp8fx.reasons.reason import Reason

__all__ = ["MaskReason"]


@unique
class MaskReason(Reason):
    """Attention masks that stay."""

    INPUT = (
        "the mask depends on {name!r}, an input of the call",
        "A padding mask, or a mask of your own. What it hides is known only when the call runs.",
        "If nothing is padded, call the model without `attention_mask`.",
    )
    MODELS_TENSOR = (
        "the mask depends on {name!r}, a tensor of the model",
        "Its values may change between calls: a buffer that holds a mask, or the length of a cache.",
        "Make the mask in `forward`, or use `is_causal=True`.",
    )
    SYMBOLIC_SIZE = (
        "the mask has symbolic sizes, and is not known to be causal for all of them",
        "The graph is compiled for sequences of any length. A sliding window is causal for short ones alone.",
        "Compile with `dynamic=False`, or pad to a few lengths.",
    )
    CODE = (
        "the mask depends on {node!r}, which may give something else in each call",
        "Random numbers, a module, or a function that is no operator of torch.",
    )
    WRITTEN = (
        "the mask is made of {node!r}, which the graph may change in place",
        "What it holds where it is read is not looked into. The body of a `cond` or of a loop may change what it gets.",
        "`torch.where` and `masked_fill` make a new tensor.",
    )
    TOO_LARGE = (
        "the mask has {elements} elements; at most {most} are evaluated",
        "The mask is made once while the graph is compiled, which takes memory.",
    )
    NOT_EVALUATED = (
        "the mask could not be evaluated: {error}",
        "torch raised an error, a size is not known, or autocast would give a value another dtype.",
    )
    OTHER = (
        "the mask hides something else than later keys",
        "A sliding window, documents, a prefix, a position bias, or queries that begin behind the first key.",
    )
    OPTION = (
        "attention='leave'",
        "You asked for attention as it is.",
    )
