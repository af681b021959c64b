"""Why a matmul is left alone, and what is said of one that is not: every kind of reason, in groups, with what helps.

The room stands above `graph` and `linears`, which both give reasons.
"""

from fp8fx.reasons.calls_and_weights import CallReason, WeightReason
from fp8fx.reasons.choices import OptionReason, WorthReason
from fp8fx.reasons.masks import MaskReason
from fp8fx.reasons.operands import OperandReason, PlaceReason
from fp8fx.reasons.reason import Because, Reason
from fp8fx.reasons.remarks import Remark

__all__ = [
    "GROUPS",
    "Because",
    "CallReason",
    "MaskReason",
    "OperandReason",
    "OptionReason",
    "PlaceReason",
    "Reason",
    "Remark",
    "WeightReason",
    "WorthReason",
]

GROUPS: tuple[type[Reason], ...] = (
    WeightReason,
    CallReason,
    OperandReason,
    PlaceReason,
    WorthReason,
    OptionReason,
    Remark,
    MaskReason,
)
"""The groups, in the order of the docs."""
