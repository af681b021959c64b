"""What the graph writes in place is no weight to freeze, and none at all once it is written."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import fp8fx
from fp8fx.graph import constants, propagate
from fp8fx.writes import writes
from tests.capture import Capture

Function = Callable[["Model", Tensor], Any]


class Model(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.fc, self.norm = nn.Linear(16, 16), nn.BatchNorm1d(16)
        for name, shape in {"w": (16, 16), "v": (16, 16), "experts": (2, 16, 16)}.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))  # symbolic_trace knows no buffers
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def written(gm: fx.GraphModule, x: Tensor) -> set[str]:
    propagate(gm, [x])
    held = constants(gm, [x])
    return {str(node.target) for node in set[fx.Node]().union(*writes(gm, held).values())}


def several(p: Model, x: Tensor) -> None:
    torch._foreach_mul_([p.w, p.v], 2.0)


def embedded(p: Model, x: Tensor) -> Tensor:
    return F.embedding(x.long().abs() % 16, p.w, max_norm=1.0)


# Each changes w, and what else is named.
WRITES: dict[str, tuple[Function, set[str]]] = {
    "method": (lambda p, x: p.w.copy_(x), set()),
    "function": (lambda p, x: torch.relu_(p.w), set()),
    "operator": (lambda p, x: p.w.__iadd__(x), set()),
    "setitem": (lambda p, x: p.w.__setitem__((slice(None), 3), x[:, 0]), set()),
    "index": (lambda p, x: p.w.index_copy_(0, torch.tensor([1]), x[:1]), set()),
    "view": (lambda p, x: p.w.t().view(16, 4, 4)[2].add_(1), set()),
    "diagonal": (lambda p, x: p.w.diagonal().zero_(), set()),  # a view that no list of ours names
    "alias": (lambda p, x: p.w.float().mul_(2), set()),  # a cast that casts nothing
    "chunk": (lambda p, x: p.w.chunk(2)[1].mul_(x[0, 0]), set()),
    "detach": (lambda p, x: p.w.detach().mul_(2), set()),
    "out": (lambda p, x: torch.add(x, 1, out=p.w), set()),
    "outs": (lambda p, x: torch.aminmax(x, dim=1, out=(p.w[0], p.w[1])), set()),
    "inplace": (lambda p, x: F.relu(p.w, inplace=True), set()),
    "positional": (lambda p, x: F.relu(p.w, True), set()),
    "several": (several, {"v"}),
    "embedding": (embedded, set()),
    "overload": (lambda p, x: torch.ops.aten.copy_.default(p.w, x), set()),
    "packet": (lambda p, x: torch.ops.aten.add_(p.w, x), set()),
    "second": (lambda p, x: torch.ops.aten.add.out(x, x, out=p.w), set()),
}


@pytest.mark.parametrize("kind", WRITES)
def test_every_way_to_write(kind: str) -> None:
    function, others = WRITES[kind]
    assert written(fx.symbolic_trace(Model(function)), torch.randn(16, 16)) == {"w"} | others


@pytest.mark.parametrize(
    "function",
    [
        lambda p, x: p.w.clone().mul_(2),
        lambda p, x: F.linear(x, p.w).add_(1),
        lambda p, x: p.w.sum(-1, True),
        lambda p, x: F.relu(p.fc(x), True),
        lambda p, x: p.norm(F.linear(x, p.w)),
        lambda p, x: F.embedding(x.long().abs() % 16, p.w),
        lambda p, x: x.copy_(p.w),
        lambda p, x: torch.add(p.w, 1, out=x),
        lambda p, x: p.w.double().mul_(2),
        lambda p, x: torch.ops.aten.copy_.default(x, p.w),
        lambda p, x: ~p.w.isnan(),
    ],
)
def test_what_writes_something_else_or_nothing(function: Function) -> None:
    assert written(fx.symbolic_trace(Model(function)), torch.randn(16, 16)) == set()


def test_without_values_the_names_tell() -> None:
    gm = fx.symbolic_trace(Model(lambda p, x: p.w.t().copy_(x.new_zeros(x.shape))))
    held = constants(gm, None)
    assert writes(gm, held) == {next(iter(gm.graph.find_nodes(op="call_method", target="copy_"))): held}


def test_two_buffers_in_one_memory_are_both_written() -> None:
    model = Model(lambda p, x: F.linear(x, p.v) + p.w.add_(1))
    memory = torch.randn(32, 16)
    model.w.data, model.v.data = memory[:16], memory[8:24]
    assert written(fx.symbolic_trace(model), torch.randn(16, 16)) == {"w", "v"}


def linear(p: Model, x: Tensor) -> Tensor:
    return F.linear(x, p.w)


def then_written(p: Model, x: Tensor) -> Tensor:
    y = F.linear(x, p.w)
    p.w.add_(0.5)
    return y


def first_written(p: Model, x: Tensor) -> Tensor:
    p.w.add_(0.5)
    return F.linear(x, p.w)


def beside(p: Model, x: Tensor) -> Tensor:
    """Siblings that would be merged."""
    y = F.linear(x, p.w), F.linear(x, p.v), p.fc(x)
    p.w[:, 3].copy_(x[:, 0])
    return torch.cat(y)


def cache(p: Model, x: Tensor) -> Tensor:
    p.experts[0].copy_(x)
    return torch.bmm(x.expand(2, 16, 16), p.experts)


def in_checkpoint(p: Model, x: Tensor) -> Tensor:
    def body(y: Tensor) -> Tensor:
        p.w.add_(0.5)
        return y * 2

    return F.linear(checkpoint(body, x, use_reentrant=False), p.w)


def beside_checkpoint(p: Model, x: Tensor) -> Tensor:
    return F.linear(checkpoint(lambda y: F.linear(y, p.w), x, use_reentrant=False), p.w)


@pytest.mark.parametrize("through", ["convert", "compile"])
@pytest.mark.parametrize(
    ("function", "rewritten", "frozen"),
    [(linear, 1, 1), (then_written, 1, 0), (first_written, 0, 0), (beside, 3, 2), (cache, 0, 0)],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_frozen_is_as_unfrozen_call_after_call(through: str, function: Function, rewritten: int, frozen: int) -> None:
    results = []
    for freeze in (False, True):
        model, config = Model(function), fp8fx.Config(freeze=freeze, profit="always", recipe="rowwise")
        if through == "convert":
            call = new = fp8fx.convert(fx.symbolic_trace(model), (torch.randn(16, 16),), config)
            report = new.meta["fp8fx_report"]
        else:
            capture = Capture(config)
            call = torch.compile(model, backend=capture, fullgraph=True)
        torch.manual_seed(1)
        with torch.no_grad():
            results.append([call(torch.randn(16, 16)) for _ in range(3)])
        report = report if through == "convert" else capture.only.report
        assert len(report.rewritten) == rewritten
        assert sum("graph writes" in (row.remark or "") for row in report.rewritten) == (rewritten - frozen) * freeze
    for unfrozen, found in zip(*results, strict=True):
        assert torch.equal(unfrozen, found)


def test_a_step_of_training_in_one_graph_keeps_its_weights() -> None:
    def step(p: Model, x: Tensor) -> Tensor:
        y = F.linear(x, p.w)
        p.w.sub_(y.t() @ x, alpha=0.1)
        return y

    gm = fx.symbolic_trace(model := Model(step))
    assert len(fp8fx.convert(gm, (torch.randn(16, 16),), profit="always").meta["fp8fx_report"].rewritten) == 1
    assert copy.deepcopy(model).w.equal(model.w)


@pytest.mark.parametrize(("function", "rewritten"), [(in_checkpoint, 0), (beside_checkpoint, 2)])
def test_a_body_writes_what_it_writes_and_no_more(function: Function, rewritten: int) -> None:
    capture, x = Capture(fp8fx.Config(profit="always")), torch.randn(16, 16, requires_grad=True)
    torch.compile(Model(function), backend=capture, fullgraph=True)(x)
    assert len(capture.only.report.rewritten) == rewritten
