"""A torch.compile backend that keeps each graph as it was before and after the rewrite, and equality of graphs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fp8fx.config import Config
from fp8fx.convert import rewritten
from fp8fx.graph.copies import copy
from fp8fx.pipeline import Pass, Rewrite, diff, run
from fp8fx.profit.cost_model import Times
from fp8fx.profit.times import times_on
from fp8fx.report import Report
from fp8fx.weights.store import STORE, Store


def ops(graph: fx.Graph) -> Counter[Any]:
    """How often each target is called."""
    return Counter(node.target for node in graph.nodes if node.op.startswith("call_"))


@dataclass(frozen=True)
class Captured:
    """One graph of Dynamo's, before and after the rewrite."""

    before: fx.GraphModule
    after: fx.GraphModule
    report: Report


class Capture:
    """`torch.compile(model, backend=Capture(config))`: rewrites each graph, keeps it, and runs it eagerly."""

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or Config()
        self.graphs: list[Captured] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        after, report = rewritten(gm, example_inputs, self.config)
        self.graphs.append(Captured(gm, after, report))
        return after.forward

    @property
    def only(self) -> Captured:
        """The one graph there is."""
        assert len(self.graphs) == 1, f"captured {len(self.graphs)} graphs, expected one"
        return self.graphs[0]


def _lines(graph: fx.Graph) -> list[str]:
    """One line a node. Inputs and attributes, which compute nothing, go by their target; the others by their place."""
    names: dict[fx.Node, str] = {}
    lines: list[str] = []
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            names[node] = f"<{node.op} {node.target}>"
        else:
            names[node] = f"<{len(lines)}>"
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: _Name(names[n]))
            lines.append(f"{names[node]} = {node.op} {node.target} {args} {kwargs}")
    return lines


class _Name(str):
    """A node's name; without quotes where a list of arguments is printed, unlike any string among them."""

    def __repr__(self) -> str:
        return str(self)


def assert_same_graph(actual: fx.Graph, expected: fx.Graph) -> None:
    """Equal node for node: op, target, arguments, output.

    Where among the nodes an input or attribute stands is left open.
    """
    before, after = _lines(expected), _lines(actual)
    assert before == after, f"the graph differs from the one expected:\n{diff(before, after)}"


def after(
    passes: Sequence[Pass],
    model: nn.Module,
    example_inputs: Sequence[Any] | None = None,
    *,
    store: Store = STORE,
    times: Callable[[torch.device], Times] = times_on,
    **options: Any,
) -> Rewrite:
    """Where a rewrite stands after these passes. A model that is no GraphModule is traced."""
    gm = model if isinstance(model, fx.GraphModule) else fx.symbolic_trace(model)
    rewrite = Rewrite(copy(gm), Config(**options), example_inputs, store=store, times=times)
    run(rewrite, passes)
    return rewrite
