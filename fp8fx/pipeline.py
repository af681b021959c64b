"""What a pass is, and the runner that owns lint, recompile, timing and diff."""

from __future__ import annotations

import difflib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import fx

from fp8fx.config import Config
from fp8fx.graph.facts import Facts
from fp8fx.graph.masks import MaskedAttention
from fp8fx.linears.matches import LinearMatch, Refusal
from fp8fx.profit.choice import Choice
from fp8fx.profit.cost_model import MODEL, Times
from fp8fx.reasons import Because
from fp8fx.weights.store import Store

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
        example_inputs: the graph's inputs, if there are any; a Parameter among them is a weight.
        barred: why nothing in this graph can be FP8; None if there is no such reason.
        store: the frozen tensors that graphs share; one of its own if none is handed in.
        times: the times of GEMMs on a device; the model's predictions if nothing else is handed in.
        facts: what the graph tells. While a pass runs it reads those facts that it declares.
        weights: the nodes that hold a parameter, or a buffer or a constant that the graph does not change outside
            bodies.
        own: the nodes that no input of the call reaches.
        seen: the node of every matmul, in the graph's order.
        matches: the linears still to be rewritten; after the rewrite, those that were.
        refusals: the ones left alone, each with its reason.
        siblings: the matches that become one GEMM, if they are rewritten: all of a group or none.
        choices: which GEMMs of a match to compute in FP8, by its node; all that the recipe has if there is none.
        ops: the FP8 op that a match became, by its node.
        remarks: what else the report says of a rewritten linear, by its node.
        attention: the calls of attention that had a mask.
        results: what each pass did.
    """

    gm: fx.GraphModule
    config: Config
    example_inputs: Sequence[Any] | None = None
    barred: Because | None = None
    store: Store = field(default_factory=Store)
    times: Callable[[torch.device], Times] = lambda device: MODEL
    facts: Facts = field(init=False)
    weights: set[fx.Node] = field(default_factory=set)
    own: set[fx.Node] = field(default_factory=set)
    seen: list[fx.Node] = field(default_factory=list)
    matches: list[LinearMatch] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    siblings: list[list[LinearMatch]] = field(default_factory=list)
    choices: dict[fx.Node, Choice] = field(default_factory=dict)
    ops: dict[fx.Node, fx.Node] = field(default_factory=dict)
    remarks: dict[fx.Node, list[Because]] = field(default_factory=dict)
    attention: list[MaskedAttention] = field(default_factory=list)
    results: list[PassResult] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.facts = Facts(self.gm, self.example_inputs)

    def remark(self, node: fx.Node, remark: Because) -> None:
        """Adds to what the report says of the linear that was `node`."""
        self.remarks.setdefault(node, []).append(remark)

    def refuse(self, match: LinearMatch, reason: Because) -> None:
        """Adds a match to the refusals."""
        self.refusals.append(match.refused(reason))


@dataclass(frozen=True)
class PassResult:
    """What one pass did.

    Attributes:
        name: the pass's.
        count: how many linears it matched, refused or rewrote, or how many calls it changed.
        modified: whether the graph changed.
        seconds: how long it took, lint included.
    """

    name: str
    count: int
    modified: bool
    seconds: float


class Pass(Protocol):
    """What a file of passes/rewrite offers."""

    __name__: str
    NEEDS: tuple[str, ...]
    """The names of the facts that it reads."""
    CHANGES: bool
    """Whether it changes the graph, after which the facts are stale; otherwise only what the Rewrite holds."""

    def run(self, rewrite: Rewrite) -> int:
        """Changes `rewrite` and returns how many linears that touched."""


def _listing(gm: fx.GraphModule) -> list[str]:
    return [node.format_node() or node.name for node in gm.graph.nodes]


def _run_pass(rewrite: Rewrite, rewrite_pass: Pass) -> PassResult:
    name = rewrite_pass.__name__.rpartition(".")[2]
    start = time.perf_counter()
    with rewrite.facts.declared_by(name, rewrite_pass.NEEDS):
        if "shapes" in rewrite_pass.NEEDS:
            rewrite.facts.shapes  # noqa: B018 - the nodes' values, from which other facts follow
        count = rewrite_pass.run(rewrite)
    modified = rewrite_pass.CHANGES and count > 0
    if modified:
        rewrite.facts.forget()
        rewrite.gm.graph.lint()
    return PassResult(name, count, modified, time.perf_counter() - start)


def run(rewrite: Rewrite, passes: Sequence[Pass]) -> None:
    """Runs the passes in order. A graph that a pass changed is linted, and recompiled once at the end.

    Raises:
        GraphError: the example inputs do not fit the graph.
        RuntimeError: a pass reads a fact that it does not declare, or breaks the graph.
    """
    for rewrite_pass in passes:
        is_shown = rewrite_pass.CHANGES and log.isEnabledFor(logging.DEBUG)
        before = _listing(rewrite.gm) if is_shown else []
        result = _run_pass(rewrite, rewrite_pass)
        rewrite.results.append(result)
        log.debug("pass %s: %d in %.1f ms", result.name, result.count, result.seconds * 1e3)
        if is_shown and result.modified:
            log.debug("%s", diff(before, _listing(rewrite.gm)))
    if any(result.modified for result in rewrite.results):
        rewrite.gm.recompile()
