"""The tables of reasons as Markdown, for docs/limitations.md."""

from __future__ import annotations

import re

from fp8fx.reasons import GROUPS, Reason

__all__ = ["BEGIN", "END", "markdown", "updated"]

BEGIN = "<!-- reasons: begin (written by `python -m fp8fx.reasons docs/limitations.md`) -->"
END = "<!-- reasons: end -->"


def _shown(text: str) -> str:
    """A reason's text with its fields in italics, as `the *operand* is sparse: *layout*`."""
    return re.sub(r"\{(\w+)[^}]*\}", lambda field: f"*{field[1].replace('_', ' ')}*", text)


def _table(group: type[Reason]) -> str:
    kinds = list(group)
    lines = ["| reason | meaning | what helps |", "|---|---|---|"]
    lines += [f"| {_shown(kind.text)} | {kind.meaning} | {kind.fix} |" for kind in kinds]
    return "\n".join((f"### {kinds[0].heading}", "", *lines))


def markdown() -> str:
    """Every kind of reason: a heading and a table for each group."""
    return "\n\n".join(map(_table, GROUPS))


def updated(page: str) -> str:
    """The page with these tables between its two markers.

    Raises:
        ValueError: the page does not have each marker once.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(f"the page needs each of these lines once, in this order: {BEGIN} {END}")
    return f"{before}{BEGIN}\n\n{markdown()}\n\n{END}{after}"
