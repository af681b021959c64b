"""What the report says of a linear that was rewritten."""

from __future__ import annotations

from enum import unique

from fp8fx.reasons.reason import Reason

__all__ = ["Remark"]


@unique
class Remark(Reason):
    """Remarks on rewritten linears."""

    FASTER = (
        "{source}: {speeds}",
        "The GEMMs that run in FP8, and how much faster each is, as measured or predicted.",
    )
    SLOWER = (
        "FP8 is not worth it, {source}: {speeds}",
        "These of its GEMMs stay in high precision, where FP8 would be slower.",
        '`profit="always"` runs them in FP8 all the same.',
    )
    VALUE_UNKNOWN = (
        "not frozen: the weight's value is not known here",
        "The weight is inside the body of a higher-order operator (checkpointing, `cond`), "
        "is an input of a graph given to `convert`, is in a graph that DDPOptimizer has split, "
        "or has a forward GEMM in high precision.",
    )
    WRITTEN = (
        "not frozen: the graph writes it",
        "The graph changes the weight in place, before or after it is read.",
    )
    ONE_GEMM = (
        "one GEMM with {siblings}",
        "Frozen linears that read the same input are computed as one GEMM.",
    )
    APART_BY_AMAX = (
        "not merged with its siblings: their weights' amaxes differ by more than {ratio:.0f}x",
        "One scale per tensor would not serve all the weights.",
        'Use `recipe="rowwise"`, which has a scale for each output channel.',
    )
    APART_BY_COPIES = (
        "not merged with its siblings: copies of their results would take longer",
        "Results that need strides of their own, such as a graph's outputs, have to be copied out of the one GEMM's.",
    )
    APART_ELSEWHERE = (
        "not merged with its siblings: another graph has frozen them apart",
        "The first graph of a model that freezes the weights decides for the others.",
    )
