"""The linears of a model that are in none of its graphs: each has a row, and the share of the FLOPs counts them."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations

import fp8fx

IN_NO_GRAPH = "in no graph: not called, or run outside of them"


class Hiding(nn.Module):
    """One linear in a graph, and whatever is in `hidden` where Dynamo does not look."""

    def __init__(self, *hidden: nn.Module) -> None:
        super().__init__()
        self.seen, self.hidden = nn.Linear(16, 16), nn.ModuleList(hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.seen(x))

    @torch.compiler.disable
    def run(self, x: Tensor) -> Tensor:
        return x


def unseen(report: fp8fx.Report) -> list[tuple[str, str, str, str, str]]:
    assert {row.reason for row in report.rows if not row.in_graph} <= {IN_NO_GRAPH}
    return [(row.name, row.form, row.m, row.k, row.n) for row in report.rows if not row.in_graph]


def names(called: Any, *args: Any) -> list[str]:
    return [name for name, *_ in unseen(fp8fx.explain(called, *args))]


def test_linears_in_no_graph_have_rows_and_count() -> None:
    report = fp8fx.explain(Hiding(nn.Linear(16, 48), nn.Linear(8, 32, bias=False)), torch.randn(4, 16))
    assert unseen(report) == [
        ("hidden.0.weight", "Linear", "?", "16", "48"),
        ("hidden.1.weight", "Linear", "?", "8", "32"),
    ]
    assert (len(report.rewritten), len(report.refused), report.flops_share) == (1, 2, None)
    assert (report.unseen_values, report.values) == (16 * 48 + 8 * 32, 16 * 16 + 16 * 48 + 8 * 32)
    assert report.summary == (
        "1 of 3 matmuls rewritten, share of the matmul FLOPs: "
        "unknown (2 linears are in no graph, with 80.0% of the linears' weights)"
    )
    assert "hidden.1  Linear    ? x 8 x 32" in str(report) and IN_NO_GRAPH in str(report)


def test_one_linear_in_no_graph_and_none_in_any() -> None:
    model = Hiding(nn.Linear(16, 16))
    assert (
        "(1 linear is in no graph, with 50.0% of the linears' weights)"
        in fp8fx.explain(model, torch.randn(4, 16)).summary
    )
    report = fp8fx.explain(nn.LSTM(16, 8), torch.randn(3, 4, 16))
    assert report.summary.startswith(
        "nothing was rewritten: 0 of 2 matmuls, share of the matmul FLOPs: unknown (2 linears"
    )
    assert unseen(report) == [(f"weight_{kind}_l0", "LSTM", "?", "?", "?") for kind in ("ih", "hh")]


def test_a_model_that_is_seen_whole_has_no_such_row() -> None:
    model, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)), torch.randn(4, 16)
    report = fp8fx.explain(model, x)
    assert unseen(report) == []
    assert (report.values, report.unseen_values, report.flops_share) == (512, 0, 1)


NO_LINEARS: dict[str, Callable[[], nn.Module]] = {
    "embedding": lambda: nn.Embedding(10, 16),
    "bag": lambda: nn.EmbeddingBag(10, 16),
    "convolution": lambda: nn.Conv2d(4, 4, 3),
    "transposed convolution": lambda: nn.ConvTranspose1d(4, 4, 3),
    "parametrized convolution": lambda: parametrizations.weight_norm(nn.Conv1d(4, 4, 3)),
    "norm": lambda: nn.LayerNorm((4, 16)),
    "lazy": lambda: nn.LazyLinear(4),
}


@pytest.mark.parametrize("kind", NO_LINEARS)
def test_modules_that_are_no_linears(kind: str) -> None:
    assert names(Hiding(NO_LINEARS[kind]()), torch.randn(4, 16)) == []


class Own(nn.Module):
    """Parameters outside of an nn.Linear: of these `w` and `experts` may multiply something."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {"w": (8, 4), "experts": (3, 8, 4), "token": (1, 1, 16), "scale": (16,), "column": (16, 1)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))


def test_other_parameters_than_a_linear_s() -> None:
    assert names(Hiding(Own()), torch.randn(4, 16)) == ["hidden.0.w", "hidden.0.experts"]
    assert names(Hiding(nn.Linear(16, 1)), torch.randn(4, 16)) == ["hidden.0.weight"]


def test_a_parametrized_weight_is_one() -> None:
    model = Hiding(parametrizations.weight_norm(nn.Linear(16, 8)))
    assert [row[0] for row in unseen(fp8fx.explain(model, torch.randn(4, 16)))] == ["hidden.0.weight"]
    model = Hiding()
    model.seen = parametrizations.weight_norm(nn.Linear(16, 8))
    assert names(model, torch.randn(4, 16)) == []


def test_a_tied_weight_is_read_by_any_of_its_names() -> None:
    model = Hiding(nn.Linear(16, 16))
    model.hidden[0].weight = model.seen.weight  # type: ignore[union-attr]
    assert names(model, torch.randn(4, 16)) == []


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.fc, x, use_reentrant=False)  # type: ignore[no-any-return]


def test_a_weight_that_only_the_body_of_a_higher_order_operator_reads_is_read() -> None:
    assert names(Checkpointed(), torch.randn(4, 16, requires_grad=True)) == []


def test_what_is_called_may_be_compiled_a_method_or_a_function() -> None:
    x, expected = torch.randn(4, 16), ["hidden.0.weight"]
    model = Hiding(nn.Linear(16, 16))
    assert names(torch.compile(model, backend="eager"), x) == expected
    assert names(model.forward, x) == expected
    assert names(torch.compile(model.forward, backend="eager"), x) == expected
    assert names(lambda x: model(x), x) == []  # whose model is not known
    model.compile(backend="eager")
    assert names(model, x) == expected
    model = Hiding(nn.Linear(16, 16))
    model.hidden[0] = torch.compile(model.hidden[0], backend="eager")  # type: ignore[assignment]
    assert names(model, x) == expected


@pytest.mark.compiles
def test_frozen_models() -> None:
    model, x = Hiding(nn.Linear(16, 16)).requires_grad_(False), torch.randn(4, 16)
    compiled = torch.compile(model, backend="fp8", options={"freeze": True})
    with torch.no_grad():
        compiled(x)
        assert names(model, x) == ["hidden.0.weight"]
        assert names(compiled, x) == ["hidden.0.weight"]
        fp8fx.freeze(model)
        assert names(compiled, x) == ["hidden.0.weight"]
        assert names(fp8fx.convert(nn.Sequential(nn.Linear(16, 16)), freeze=True), x) == []


@pytest.fixture
def group() -> Iterator[None]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Wide(nn.Module):
    """Over a megabyte each way, from which on DDPOptimizer splits."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.unused = nn.Linear(16, 20000), nn.Linear(20000, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)))


@pytest.mark.usefixtures("group")
def test_under_ddp_what_a_part_of_a_split_graph_reads_is_read() -> None:
    report = fp8fx.explain(DistributedDataParallel(Wide(), bucket_cap_mb=1), torch.randn(4, 16))
    assert report.graphs == 2
    assert [name for name, *_ in unseen(report)] == ["module.unused.weight"]


@pytest.mark.usefixtures("group")
def test_under_fsdp_what_is_gathered_for_the_call_is_read() -> None:
    model = Hiding(nn.Linear(16, 16))
    fully_shard(model)
    assert names(model, torch.randn(4, 16)) == ["hidden.0.weight"]
