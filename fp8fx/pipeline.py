"""What a pass is, and the runner that owns lint, recompile, timing and diff."""

from __future__ import annotations

import difflib
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import fx

from fp8fx.config import Config
from fp8fx.linears.matches import LinearMatch, Refusal
from fp8fx.profit.choice import Choice
from fp8fx.reasons import Because

__all__ = ["Pass", "PassResult", "Rewrite", "diff", "run"]


def diff(before: Iterable[str], after: Iterable[str]) -> str:
    """A unified diff of two listings of nodes."""
    return "\n".join(difflib.unified_diff(list(before), list(after), "before", "after", lineterm="", n=1))


log = logging.getLogger("fp8fx")


@dataclass
class Rewrite:
    """What the passes work on: one graph and what has been found out about it so far.

    Attributes:
        gm: the graph being rewritten, in place.
        config: what the user asked for.
        example_inputs: the graph's inputs, where there are any; a Parameter among them is a weight.
        barred: why nothing in this graph can be FP8; None if there is no such reason.
        weights: the nodes that hold a parameter, or a buffer or a constant that the graph does not change outside bodies.
        own: the nodes that no input of the call reaches.
        seen: the node of every matmul, in the graph's order.
        matches: the linears still to be rewritten; after the rewrite, those that were.
        refusals: the ones left alone, each with its reason.
        siblings: the matches that become one GEMM, if they are rewritten: all of a group or none.
        choices: which GEMMs of a match to compute in FP8, by its node; all that the recipe has where there is none.
        ops: the FP8 op that a match became, by its node.
        remarks: what else the report says of a rewritten linear, by its node.
        results: what each pass did.
    """

    gm: fx.GraphModule
    config: Config
    example_inputs: Sequence[Any] | None = None
    barred: str | None = None
    weights: set[fx.Node] = field(default_factory=set)
    own: set[fx.Node] = field(default_factory=set)
    seen: list[fx.Node] = field(default_factory=list)
    matches: list[LinearMatch] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    siblings: list[list[LinearMatch]] = field(default_factory=list)
    choices: dict[fx.Node, Choice] = field(default_factory=dict)
    ops: dict[fx.Node, fx.Node] = field(default_factory=dict)
    remarks: dict[fx.Node, list[str]] = field(default_factory=dict)
    results: list[PassResult] = field(default_factory=list)

    def remark(self, op: fx.Node, text: str) -> None:
        """Adds to what the report says of the linears that became `op`."""
        for node, other in self.ops.items():
            if other is op:
                self.remarks.setdefault(node, []).append(text)

    def refuse(self, match: LinearMatch, reason: Because | str) -> None:
        """Moves a match to the refusals."""
        self.refusals.append(match.refused(reason))


@dataclass(frozen=True)
class PassResult:
    """What one pass did.

    Attributes:
        name: the pass's.
        count: how many linears it matched, refused or rewrote.
        modified: whether the graph changed.
        seconds: how long it took, lint included.
    """

    name: str
    count: int
    modified: bool
    seconds: float


class Pass(Protocol):
    """What a file of passes/ offers."""

    __name__: str
    MODIFIES: bool
    """Whether the pass changes the graph, or only what is known about it."""

    def run(self, rewrite: Rewrite) -> int:
        """Changes `rewrite` and returns how many linears that touched."""


def _listing(gm: fx.GraphModule) -> list[str]:
    return [node.format_node() or node.name for node in gm.graph.nodes]


def run(rewrite: Rewrite, passes: Sequence[Pass]) -> None:
    """Runs the passes in order. A graph that a pass changed is linted, and recompiled once at the end."""
    for one in passes:
        before = _listing(rewrite.gm) if one.MODIFIES and log.isEnabledFor(logging.DEBUG) else None
        start = time.perf_counter()
        count = one.run(rewrite)
        modified = one.MODIFIES and count > 0
        if modified:
            rewrite.gm.graph.lint()
        result = PassResult(one.__name__.rpartition(".")[2], count, modified, time.perf_counter() - start)
        rewrite.results.append(result)
        log.debug("pass %s: %d in %.1f ms", result.name, result.count, result.seconds * 1e3)
        if before is not None and modified:
            log.debug("%s", diff(before, _listing(rewrite.gm)))
    if any(result.modified for result in rewrite.results):
        rewrite.gm.recompile()
