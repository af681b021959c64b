"""Where a graph does the same again and again, as a model of equal layers does.

    x = embed(i); x = f(x, w0); x = f(x, w1); x = f(x, w2); y = head(x)    ->    three equal stretches, one f each

They are found by the nodes themselves: no name of a module tells what its layers compute.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import fx
from torch.fx.node import map_aggregate

__all__ = ["Stretch", "equal_stretches"]

_LENGTHS = (1, 8)
"""How many calls in a row are looked for again. A layer may have no call that it has once, but a sequence of some."""

_PERIODS = 8
"""How many of the most frequent distances between equal sequences are tried."""

_LEAST = 3
"""How many periods a run has at least."""


@dataclass(frozen=True)
class Stretch:
    """Consecutive calls of a graph.

    Attributes:
        nodes: the calls, in the graph's order.
        inputs: what they read from elsewhere, in the order of its first use.
        outputs: those of the calls that are read elsewhere.
    """

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]

    @classmethod
    def of(cls, nodes: Sequence[fx.Node]) -> Stretch:
        """That of these calls."""
        own = set(nodes)
        inputs = dict.fromkeys(source for node in nodes for source in _sources(node) if source not in own)
        outputs = [node for node in nodes if any(user not in own for user in node.users)]
        return cls(tuple(nodes), tuple(inputs), tuple(outputs))

    def wiring(self) -> object:
        """Equal for stretches of equal calls that read each other, and what is outside, in the same way."""
        places = {node: place for place, node in enumerate((*self.inputs, *self.nodes))}
        reads = tuple(tuple(places[source] for source in _sources(node)) for node in self.nodes)
        return reads, tuple(places[node] for node in self.outputs)


def _sources(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes among a call's arguments, as often as they are there, in slices too."""
    sources: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), sources.append)
    return iter(sources)


def _call(node: fx.Node) -> str:
    """Equal for calls of the same with the same arguments, as far as these are no nodes."""
    arguments = map_aggregate((node.args, node.kwargs), lambda leaf: "%" if isinstance(leaf, fx.Node) else repr(leaf))
    target = node.target if isinstance(node.target, str) else id(node.target)
    return repr((node.op, target, arguments))


@dataclass(frozen=True)
class _Run:
    """Calls from `start` to `stop`, each of which equals the one a period later, where there is one.

    Their places are those in a list.
    """

    start: int
    stop: int
    period: int

    @property
    def saved(self) -> int:
        """How many calls are repetitions, if only whole periods count."""
        return (self.stop - self.start) // self.period * self.period - self.period


def _longest_run(kinds: Sequence[int], period: int) -> _Run:
    """Of the runs of this period."""
    best = _Run(0, period, period)
    start = 0
    for here in range(period, len(kinds)):
        if kinds[here] != kinds[here - period]:
            start = here - period + 1
        elif here + 1 - start > best.stop - best.start:
            best = _Run(start, here + 1, period)
    return best


def _best_run(kinds: Sequence[int], ends: Sequence[bool], least_ends: int) -> _Run | None:
    """The run that saves most; None if nothing repeats often enough."""
    distances = Counter[int]()
    for length in _LENGTHS:
        last: dict[tuple[int, ...], int] = {}
        for here in range(len(kinds) - length + 1):
            sequence = tuple(kinds[here : here + length])
            if sequence in last:
                distances[here - last[sequence]] += 1
            last[sequence] = here
    likely = sorted(distances, key=lambda distance: -distance * distances[distance])[:_PERIODS]
    runs = [_longest_run(kinds, period) for period in likely]
    layers = [
        run
        for run in runs
        if run.stop - run.start >= _LEAST * run.period and sum(ends[run.start : run.start + run.period]) >= least_ends
    ]
    return max(layers, key=lambda run: (run.saved, -run.period), default=None)


def _best_offset(nodes: Sequence[fx.Node], run: _Run, may_end: Callable[[fx.Node], bool]) -> int:
    """Where periods are best cut apart: behind a call that may end one, where the fewest values are read later."""
    places = {node: place for place, node in enumerate(nodes)}
    two_periods = nodes[run.start : run.start + 2 * run.period]
    last_reads = [max((places.get(user, len(nodes)) for user in node.users), default=-1) for node in two_periods]

    def crossing(offset: int) -> int:
        end = run.start + offset + run.period
        return sum(last_read >= end for last_read in last_reads[offset : offset + run.period])

    ends = [offset for offset in range(run.period) if may_end(nodes[run.start + offset + run.period - 1])]
    return min(ends or range(run.period), key=lambda offset: (crossing(offset), offset))


def equal_stretches(
    nodes: Sequence[fx.Node],
    may_repeat: Callable[[fx.Node], bool],
    may_end: Callable[[fx.Node], bool],
    least_ends: int = 0,
) -> Iterator[list[Stretch]]:
    """Stretches of calls that are equal to each other, by what is called and with which constants.

    Whether they also read each other in the same way, their `wiring` tells.

    Args:
        nodes: a graph's calls, in its order.
        may_repeat: whether a call may be part of a stretch.
        may_end: whether it may be the last one of a stretch; if no call may, a stretch ends anywhere.
        least_ends: how many calls of a stretch may end one, at least.

    Yields:
        Lists of two stretches or more, which follow each other: one fewer than there are layers, if the cut is inside
        a layer.
    """
    seen: dict[str, int] = {}
    unique = itertools.count(-1, -1)
    kinds = [seen.setdefault(_call(node), len(seen)) if may_repeat(node) else next(unique) for node in nodes]
    ends = [may_end(node) for node in nodes]
    pending = [(0, len(nodes))]
    while pending:
        start, stop = pending.pop()
        run = _best_run(kinds[start:stop], ends[start:stop], least_ends)
        if run is None:
            continue
        within = nodes[start:stop]
        begin = run.start + _best_offset(within, run, may_end)
        last = run.stop - run.period
        yield [Stretch.of(within[i : i + run.period]) for i in range(begin, last + 1, run.period)]
        pending += [(start + run.stop, stop), (start, start + run.start)]
