"""The runner: passes in order, lint, timing, recompilation, the log."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fp8fx.config import Config
from fp8fx.passes.rewrite import PIPELINE, check, decide, expand, freeze, match, merge, replace
from fp8fx.pipeline import PassResult, Rewrite, run


class Pass:
    """A pass made of a function."""

    def __init__(self, name: str, function: Callable[[Rewrite], int], modifies: bool = False) -> None:
        self.__name__ = f"somewhere.{name}"
        self.CHANGES = modifies
        self.NEEDS = ()
        self.run = function


def rewrite_of(model: nn.Module | None = None) -> Rewrite:
    return Rewrite(fx.symbolic_trace(model or nn.Sequential(nn.Linear(4, 4), nn.ReLU())), Config())


def insert_relu(rewrite: Rewrite) -> int:
    """Puts a relu before the output."""
    graph = rewrite.gm.graph
    (output,) = graph.find_nodes(op="output")
    with graph.inserting_before(output):
        output.args = (graph.call_function(torch.relu, (output.args[0],)),)
    return 1


def test_the_pipeline() -> None:
    """Other passes may stand between these."""
    order = [expand, match, check, decide, replace, merge, freeze]
    assert [rewrite_pass for rewrite_pass in PIPELINE if rewrite_pass in order] == order
    assert [rewrite_pass for rewrite_pass in order if rewrite_pass.CHANGES] == [expand, replace, merge, freeze]


def test_passes_run_in_order_on_one_rewrite() -> None:
    seen: list[tuple[str, int]] = []
    rewrite = rewrite_of()
    passes = [Pass(name, lambda r, name=name: seen.append((name, id(r))) or 0) for name in "abc"]
    run(rewrite, passes)
    assert seen == [(name, id(rewrite)) for name in "abc"]


def test_results() -> None:
    rewrite = rewrite_of()
    passes = [
        Pass("looks", lambda r: 3),
        Pass("finds_nothing", lambda r: 0, modifies=True),
        Pass("changes", insert_relu, modifies=True),
        Pass("changes", insert_relu, modifies=True),
    ]
    run(rewrite, passes)
    assert [(r.name, r.count, r.modified) for r in rewrite.results] == [
        ("looks", 3, False),
        ("finds_nothing", 0, False),
        ("changes", 1, True),
        ("changes", 1, True),
    ]
    assert all(isinstance(r, PassResult) and 0 <= r.seconds < 10 for r in rewrite.results)


def test_a_changed_graph_is_recompiled_once() -> None:
    rewrite = rewrite_of()
    calls: list[int] = []
    recompile = rewrite.gm.recompile
    rewrite.gm.recompile = lambda: calls.append(1) or recompile()  # type: ignore[assignment,method-assign,return-value]
    before = rewrite.gm.code
    run(rewrite, [Pass("changes", insert_relu, modifies=True)] * 2)
    assert calls == [1]
    assert rewrite.gm.code.count("torch.relu") == 2
    assert before.count("torch.relu") == 0


def test_an_unchanged_graph_is_neither_linted_nor_recompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite = rewrite_of()
    monkeypatch.setattr(fx.Graph, "lint", lambda self: pytest.fail("linted"))
    monkeypatch.setattr(fx.GraphModule, "recompile", lambda self: pytest.fail("recompiled"))
    run(rewrite, [Pass("looks", lambda r: 1), Pass("finds_nothing", lambda r: 0, modifies=True)])
    run(rewrite, [])
    assert len(rewrite.results) == 2


def test_a_pass_that_breaks_the_graph_is_found_out() -> None:
    def misplace(rewrite: Rewrite) -> int:
        first, *_, output = rewrite.gm.graph.nodes
        output.prepend(first)  # used before it is defined
        return 1

    later: list[int] = []
    with pytest.raises(RuntimeError, match="was used before it has been defined"):
        run(rewrite_of(), [Pass("misplaces", misplace, modifies=True), Pass("later", lambda r: later.append(1) or 0)])
    assert later == []


def test_refuse_moves_a_match_with_all_that_is_known() -> None:
    rewrite = rewrite_of(nn.Sequential(nn.Linear(4, 6)))
    run(rewrite, [match])
    (found,) = rewrite.matches
    rewrite.refuse(found, "because")
    (refusal,) = rewrite.refusals
    assert (refusal.node, refusal.spelling, refusal.path, refusal.name) == (found.node, "Linear", "0", "0.weight")
    assert (refusal.m, refusal.k, refusal.n, refusal.reason) == (None, 4, 6, "because")


def test_the_log_shows_counts_and_a_diff(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="fp8fx"):
        run(rewrite_of(), [Pass("looks", lambda r: 2), Pass("changes", insert_relu, modifies=True)])
    messages = [r.getMessage() for r in caplog.records if r.name == "fp8fx"]
    assert messages[0].startswith("pass looks: 2 in ")
    assert messages[1].startswith("pass changes: 1 in ")
    assert messages[2].startswith("--- before\n+++ after\n")
    assert "+%relu : [num_users=1] = call_function[target=torch.relu]" in messages[2]
    assert len(messages) == 3


def test_nothing_is_listed_unless_it_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("fp8fx"), "level", logging.WARNING)
    logging.getLogger("fp8fx").manager._clear_cache()
    monkeypatch.setattr(fx.Node, "format_node", lambda *args, **kwargs: pytest.fail("listed"))
    run(rewrite_of(), [Pass("changes", insert_relu, modifies=True)])


def test_the_pipeline_end_to_end() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4).double(), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Any:
            return self.c(self.a(x)), self.b(x.double()), x @ x.mT

    rewrite = Rewrite(fx.symbolic_trace(Model()), Config(exclude="c"))
    run(rewrite, PIPELINE)
    results = {(result.name, result.count, result.modified) for result in rewrite.results}
    assert results >= {
        ("expand", 0, False),
        ("match", 3, False),
        ("check", 1, False),
        ("decide", 1, False),
        ("replace", 1, True),
        ("merge", 0, False),
        ("freeze", 0, False),
    }
    assert [m.path for m in rewrite.matches] == ["a"]
    assert [r.path for r in rewrite.refusals] == ["", "b", "c"]
    assert len(rewrite.seen) == 4
