"""Facts: computed once, kept until a pass changes the graph, and read by those passes that declare them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fp8fx.config import Config
from fp8fx.executors import hardware
from fp8fx.graph import facts
from fp8fx.graph.facts import Facts
from fp8fx.passes.rewrite import PIPELINE, decide
from fp8fx.pipeline import Pass, Rewrite, run
from fp8fx.profit import measure, remembered
from fp8fx.profit.cost_model import MODEL, Times
from fp8fx.weights.store import Store
from tests.support.capture import after


class Model(nn.Module):
    """Two siblings, a computed weight, a linear that FP8 refuses, a buffer that the graph changes, and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(16, 32)
        self.k = nn.Linear(16, 48, bias=False)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.register_buffer("count", torch.zeros(()))
        self.exact = nn.Linear(16, 16).double()
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        self.count.add_(1)
        exact = self.exact(x.double())
        return self.q(x) * 2, self.k(x) * 2, x @ (self.k.weight * 2).t(), self.attention(x, x, x)[0], exact


def captured() -> tuple[fx.GraphModule, list[Any]]:
    """The graph of the model, and its inputs."""
    graphs: list[tuple[fx.GraphModule, list[Any]]] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        graphs.append((gm, example_inputs))
        return gm.forward

    torch.compile(Model(), backend=backend)(torch.randn(4, 3, 16))
    ((gm, example_inputs),) = graphs
    return gm, example_inputs


def traced() -> fx.GraphModule:
    return fx.symbolic_trace(nn.Sequential(nn.Linear(16, 8), nn.ReLU()))


class Reader:
    """A pass that reads facts."""

    __name__ = "tests.reader"

    def __init__(self, needs: tuple[str, ...], reads: tuple[str, ...], changes: int = 0) -> None:
        self.NEEDS = needs
        self.CHANGES = changes > 0
        self.reads = reads
        self.count = changes

    def run(self, rewrite: Rewrite) -> int:
        for name in self.reads:
            getattr(rewrite.facts, name)
        return self.count


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str | None, str]]]:
    """Which pass has read which fact; None if another fact has read it."""
    reads: list[tuple[str | None, str]] = []
    read = Facts.read

    def spy(self: Facts, fact: Any) -> Any:
        reads.append((self._reader, fact.name))
        return read(self, fact)

    monkeypatch.setattr(Facts, "read", spy)
    return reads


# The contract, over the whole table of passes and of facts.


@pytest.mark.parametrize("name", sorted(Facts.names()))
def test_every_fact_is_described_and_some_pass_or_fact_reads_it(name: str, reads: list[tuple[str | None, str]]) -> None:
    assert vars(Facts)[name].__doc__
    gm, example_inputs = captured()
    after(PIPELINE, gm, example_inputs, freeze=True, store=Store())
    assert name in {fact for _, fact in reads}


@pytest.mark.parametrize("rewrite_pass", PIPELINE, ids=lambda p: p.__name__.rpartition(".")[2])
def test_a_pass_declares_the_facts_that_it_reads_and_no_other(
    rewrite_pass: Pass, reads: list[tuple[str | None, str]]
) -> None:
    assert set(rewrite_pass.NEEDS) <= Facts.names()
    gm, example_inputs = captured()
    rewrite = after(PIPELINE, gm, example_inputs, freeze=True, store=Store())
    name = rewrite_pass.__name__.rpartition(".")[2]
    read = {fact for reader, fact in reads if reader == name}
    assert read <= set(rewrite_pass.NEEDS)
    (result,) = (result for result in rewrite.results if result.name == name)
    if result.count > 0:  # otherwise it may have looked at nothing
        assert read == set(rewrite_pass.NEEDS)


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[2].glob("passes/rewrite/*.py")), ids=lambda p: p.stem)
def test_no_pass_knows_the_process_wide_store_or_measures(path: Path) -> None:
    source = path.read_text()
    assert "STORE" not in source
    assert "measure" not in {word for line in source.splitlines() if "import" in line for word in line.split()}


# The runner.


def test_a_fact_that_is_not_declared_cannot_be_read() -> None:
    rewrite = Rewrite(traced(), Config())
    with pytest.raises(RuntimeError, match="reader reads the fact 'writes', which is not among its NEEDS"):
        run(rewrite, [Reader(("constants",), ("constants", "writes"))])
    assert rewrite.facts.writes.writers == []  # outside of a pass all are there


@pytest.mark.parametrize(("changes", "times"), [(0, 1), (1, 2)])
def test_a_fact_is_computed_once_until_a_pass_changes_the_graph(
    changes: int, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[fx.GraphModule] = []
    constants = facts.constants
    monkeypatch.setattr(facts, "constants", lambda gm, inputs: computed.append(gm) or constants(gm, inputs))
    needs = ("constants", "writes")
    run(Rewrite(traced(), Config()), [Reader(needs, needs), Reader((), (), changes), Reader(needs, needs)])
    assert len(computed) == times


def test_the_shapes_are_there_before_a_pass_that_needs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[fx.GraphModule] = []
    monkeypatch.setattr(facts, "propagate", lambda gm, inputs: calls.append(gm))
    rewrite = Rewrite(traced(), Config())
    run(rewrite, [Reader((), ()), Reader(("shapes",), ()), Reader(("shapes",), ())])
    assert calls == [rewrite.gm]


# What decisions are made of.


@pytest.mark.parametrize("freeze", [False, True])
def test_decide_needs_no_device_and_no_file_if_it_is_handed_times(
    freeze: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "has_fp8_tensor_cores", lambda device: True)
    for name in ("seconds", "bandwidth"):
        monkeypatch.setattr(measure, name, lambda *args, **kwargs: pytest.fail("measured"))
    monkeypatch.setattr(remembered, "_file", lambda device: pytest.fail("looked for a file"))
    for name in ("current_device", "get_device_capability", "get_device_name", "mem_get_info"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: pytest.fail("asked for a device"))
    asked: list[torch.device] = []
    fast = Times(lambda linear, gemm, kind: 1.0 if kind == "high" else 1e-3)
    slow = Times(lambda linear, gemm, kind: 1e-3 if kind == "high" else 1.0)
    gm = fx.symbolic_trace(nn.Sequential(nn.Linear(64, 64)).requires_grad_(False))
    for times, count in ((fast, 1), (slow, 0)):
        rewrite = after(
            PIPELINE[: PIPELINE.index(decide) + 1],
            gm,
            (torch.randn(8, 64),),
            times=lambda device, times=times: asked.append(device) or times,  # type: ignore[misc]
            store=Store(),
            freeze=freeze,
        )
        assert len(rewrite.matches) == count
    assert set(asked) == {torch.device("cpu")}


def test_a_rewrite_by_itself_has_a_store_of_its_own_and_the_models_times() -> None:
    one, other = (Rewrite(traced(), Config()) for _ in range(2))
    assert one.store is not other.store
    assert one.times(torch.device("cpu")) is MODEL
