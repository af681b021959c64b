"""Reasons why a linear that FP8 can compute is left alone: it is not worth it, or you do not want it."""

from __future__ import annotations

from enum import unique

from fp8fx.reasons.reason import Reason

__all__ = ["OptionReason", "WorthReason"]


@unique
class WorthReason(Reason):
    """Not worth it."""

    SLOWER = (
        "FP8 is not worth it, {source}: {speeds} at M={m}",
        "Quantizing the operands costs more than tensor cores gain, as measured or predicted.",
        '`profit="always"` rewrites it all the same.',
    )
    EXPERTS_EACH_CALL = (
        "FP8 is not worth it: the weights of all experts would be quantized in every call",
        "`grouped_mm`, and `bmm` with 3-D weights, on tensor cores with `freeze=True`, "
        "but of a weight that cannot be frozen.",
        '`profit="always"` rewrites them ([performance](performance.md#experts)).',
    )
    EXPERTS_NOT_FROZEN = (
        "FP8 is not worth it: the weights of all experts would be quantized in every call; "
        "freeze=True quantizes them once",
        "`grouped_mm`, and `bmm` with 3-D weights, on tensor cores without `freeze`.",
        '`freeze=True` for inference. `profit="always"` rewrites them ([performance](performance.md#experts)).',
    )
    NO_GROUPED_KERNEL = (
        "FP8 is not worth it: tensor cores multiply groups in FP8 on compute capability 9.0 alone",
        "A weight for each of several experts, on another device, where FP8 would be simulated.",
        '`profit="always"` rewrites them.',
    )
    ROUTER = (
        "a router: topk chooses by it; routers=True rewrites it too",
        "topk chooses experts by it, and a choice that flips changes a token's output altogether.",
        "`routers=True` rewrites it.",
    )
    ROUTER_COMPUTED = (
        "a router: topk chooses by it; and its weight is computed, as by a cast to float32",
        "A router that stays in high precision even with `routers=True`.",
    )


@unique
class OptionReason(Reason):
    """Your own filters."""

    NEVER = (
        "profit='never'",
        "You asked for no FP8 at all.",
    )
    EXCLUDED = (
        "excluded by {pattern!r}",
        "A pattern of `exclude` fits its module path or its weight's name.",
    )
    NOT_INCLUDED = (
        "not among include={include}",
        "No pattern of `include` fits its module path or its weight's name.",
    )
    TOO_NARROW = (
        "K={k}, N={n}: below min_features={min_features}",
        "K or N is smaller than `min_features`.",
    )
