"""What a reason is: a kind, which the table has, and the details of one case.

The code tells reasons apart by their kinds. Their text is for people alone, and is made at the end.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

__all__ = ["Because", "Reason"]


class Reason(Enum):
    """A kind of reason. Each group of kinds is a subclass, whose docstring is the group's heading in the docs.

    Call a member with the details that its text names to give it as a reason.

    Attributes:
        text: what the report says, with a named field in braces for each detail.
        meaning: what that means and when it comes, for the docs.
        fix: what helps; empty if nothing does.
        fields: the names of the details that the text needs.
    """

    def __init__(self, text: str, meaning: str, fix: str = "") -> None:
        self.text = text
        self.meaning = meaning
        self.fix = fix
        self.fields = frozenset(name for _, name, _, _ in string.Formatter().parse(text) if name is not None)

    @property
    def heading(self) -> str:
        """Of the kind's group, as `What the weight is`."""
        return (type(self).__doc__ or "").removesuffix(".")

    def __repr__(self) -> str:
        return str(self)

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        # By name, not by value: a report that was saved with a model loads after a text has been improved.
        return getattr, (type(self), self.name)

    def __call__(self, **details: object) -> Because:
        """The reason with its details.

        Raises:
            TypeError: a detail is missing, or the text does not name it.
        """
        return Because(self, details)


@dataclass(frozen=True)
class Because:
    """A reason: a kind, and the details of this case. `str()` is its text.

    >>> from fp8fx.reasons import OptionReason
    >>> because = OptionReason.TOO_NARROW(k=8, n=32, min_features=64)
    >>> str(because)
    'K=8, N=32: below min_features=64'
    >>> because.kind is OptionReason.TOO_NARROW
    True

    Attributes:
        kind: the table's member.
        details: what its text names, by name.
    """

    kind: Reason
    details: Mapping[str, object]

    def __post_init__(self) -> None:
        if self.details.keys() != self.kind.fields:
            takes = ", ".join(sorted(self.kind.fields)) or "no details"
            given = ", ".join(sorted(self.details)) or "none"
            raise TypeError(f"{self.kind} takes {takes}; got {given}")

    def __str__(self) -> str:
        return self.kind.text.format(**self.details)
