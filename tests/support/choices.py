"""What the report says of a choice."""

from __future__ import annotations

from fp8fx.profit.choice import Choice

__all__ = ["remark_of"]


def remark_of(choice: Choice) -> str:
    """Its remarks as text."""
    return "; ".join(map(str, choice.remarks))
