"""What a graph changes in place: every way to write it, and what only looks like one."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import fp8fx
from fp8fx.convert import _trace
from fp8fx.graph.copies import copy
from fp8fx.graph.mutations import Writes
from fp8fx.graph.propagate import propagate
from fp8fx.recipes.quantize import sqnr
from tests.support.capture import Capture

aten = torch.ops.aten


@torch.library.custom_op("fp8fx_tests::fill_second", mutates_args=("y",))
def fill_second(x: Tensor, y: Tensor) -> Tensor:
    y.fill_(1)
    return x * 2


@fill_second.register_fake
def _(x: Tensor, y: Tensor) -> Tensor:
    return torch.empty_like(x)


@fx.wrap
def unseen(x: Tensor) -> Tensor:
    return x * 2


class Model(nn.Module):
    """A weight, tied ones, buffers and modules, and a function of them as its forward."""

    def __init__(self, function: Callable[[Model, Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.w = nn.Parameter(torch.randn(8, 8), requires_grad=False)
        self.other = nn.Parameter(torch.randn(8, 8), requires_grad=False)
        self.register_buffer("cache", torch.randn(2, 8, 8))
        self.register_buffer("ids", torch.tensor([1, 2]))
        self.register_buffer("alias", self.w.detach()[:4])
        self.fc = nn.Linear(8, 8)
        self.fc.weight = self.w
        self.relu, self.inplace, self.norm = nn.ReLU(), nn.ReLU(inplace=True), nn.BatchNorm1d(8)
        self.block = nn.Sequential(nn.Identity(), nn.Sigmoid(), nn.Hardtanh(inplace=True))
        self.embed, self.renormed = nn.Embedding(8, 8), nn.Embedding(8, 8, max_norm=1.0)
        self.embed.weight = self.renormed.weight = self.w
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def written(gm: fx.GraphModule, model: Model, example_inputs: Any = None) -> set[str]:
    writes = Writes(gm, example_inputs)
    return {
        name
        for name in ("w", "other", "cache", "norm.running_mean")
        if writes.first(attribute(model, name)) is not None
    }


def attribute(model: nn.Module, name: str) -> Tensor:
    return operator.attrgetter(name)(model)


def set_cache(p: Model, x: Tensor) -> None:
    p.cache[:, 1] = x[0]


# Each in a graph of symbolic_trace, before and after its values are known, and in Dynamo's; and what it writes.
WAYS: dict[str, tuple[Callable[[Model, Tensor], Any], set[str]]] = {
    "a method": (lambda p, x: p.w.mul_(2), {"w"}),
    "a function": (lambda p, x: torch.relu_(p.w), {"w"}),
    "by keyword": (lambda p, x: torch.relu_(input=p.w), {"w"}),
    "an operator": (lambda p, x: operator.imul(p.w, 2), {"w"}),
    "a dunder method": (lambda p, x: p.w.__imul__(2), {"w"}),
    "setitem": (set_cache, {"cache"}),
    "through a view": (lambda p, x: p.cache.mT.mul_(2), {"cache"}),
    "through views": (
        lambda p, x: p.cache.view(-1).unflatten(0, (2, 64))[0].unfold(0, 2, 2).diagonal().add_(1),
        {"cache"},
    ),
    "through a part": (lambda p, x: p.w.chunk(2)[1].zero_(), {"w"}),
    "through data": (lambda p, x: p.w.data.mul_(2), {"w"}),
    "through detach": (lambda p, x: p.w.detach().copy_(x), {"w"}),
    "through another tensor of its memory": (lambda p, x: p.alias.mul_(2), {"w"}),
    "through what is contiguous already": (lambda p, x: p.w.contiguous().mul_(2), {"w"}),
    "through a cast to its own dtype": (lambda p, x: p.w.to(torch.float32).mul_(2), {"w"}),
    "through a dropout of nothing": (lambda p, x: F.dropout(p.w, 0.5, False).mul_(2), {"w"}),
    "an index": (lambda p, x: p.cache.index_copy_(1, p.ids, x.expand(2, 8, 8)[:, :2]), {"cache"}),
    "out=": (lambda p, x: torch.add(x, 1, out=p.w), {"w"}),
    "two of out=": (lambda p, x: torch.topk(x, 8, out=(p.w, torch.empty(8, 8, dtype=torch.long))), {"w"}),
    "inplace=": (lambda p, x: F.relu(p.w, inplace=True), {"w"}),
    "inplace, by position": (lambda p, x: F.leaky_relu(p.w, 0.1, True), {"w"}),
    "an operator's overload": (lambda p, x: aten.add_.Tensor(p.w, x), {"w"}),
    "an operator's packet": (lambda p, x: aten.add_(p.w, x), {"w"}),
    "a list of tensors": (lambda p, x: torch._foreach_mul_([p.w, p.other], 2), {"w", "other"}),
    "an operator that changes its second argument": (lambda p, x: fill_second(p.other, p.w), {"w"}),
    "the same by name": (lambda p, x: fill_second(y=p.w, x=p.other), {"w"}),
    "torch.nn.init": (lambda p, x: nn.init.zeros_(p.w), {"w"}),
    "an embedding that renorms": (lambda p, x: F.embedding(p.ids, p.w, max_norm=1.0), {"w"}),
    "an einsum of one operand": (lambda p, x: torch.einsum("ij->ji", p.w).mul_(2), {"w"}),
    "an einsum of two": (lambda p, x: torch.einsum("ij,jk->ik", x, p.w).mul_(2), set()),
    "what a linear computes of it": (lambda p, x: p.fc(p.cache).add_(1), set()),
    "nothing": (lambda p, x: p.w.mul(2) + p.other, set()),
    "a copy": (lambda p, x: p.w.clone().mul_(2), set()),
    "a sum that keeps its dimension": (lambda p, x: torch.sum(p.w, 0, True), set()),
    "what was computed": (lambda p, x: F.relu(F.linear(x, p.w), inplace=True).add_(1), set()),
    "the input": (lambda p, x: x.add_(p.w), set()),
    "a matmul in place": (lambda p, x: operator.imatmul(p.w, x), set()),
    "an embedding": (lambda p, x: F.embedding(p.ids, p.w).mul_(2), set()),
    "sorted": (lambda p, x: torch.sort(p.w)[0] + p.w.sort()[0], set()),
}


@pytest.mark.parametrize("way", [way for way in WAYS if way != "an operator"])  # which symbolic_trace takes for `w * 2`
def test_what_a_traced_graph_changes(way: str) -> None:
    function, expected = WAYS[way]
    model = Model(function)
    gm = fx.GraphModule(model, _trace(model))
    assert written(gm, model) == expected
    gm = copy(gm)
    propagate(gm, (torch.randn(8, 8),))
    assert written(gm, model) == expected


@pytest.mark.parametrize(
    "way", [way for way in WAYS if way != "through a dropout of nothing"]
)  # which torch.compile takes for a copy
def test_what_dynamos_graph_changes(way: str) -> None:
    function, expected = WAYS[way]
    model, found = Model(function), list[set[str]]()

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        found.append(written(gm, model, example_inputs))
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(torch.randn(8, 8))
    assert found == [expected]


@pytest.mark.parametrize("mode", ["real", "fake"])
def test_what_make_fxs_graph_changes(mode: Any) -> None:
    model = Model(lambda p, x: (p.w.view(-1).chunk(2)[0].mul_(2), p.cache[0].add(p.other).mul_(2)))
    gm = make_fx(model, tracing_mode=mode, _allow_non_fake_inputs=True)(torch.randn(8, 8))
    writes = Writes(gm)
    changed = [node for node in gm.graph.find_nodes(op="get_attr") if writes.first(node) is not None]
    assert [getattr(gm, str(node.target)).untyped_storage()._cdata for node in changed] == [
        model.w.untyped_storage()._cdata
    ]


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda p, x: p.fc(x), set()),
        (lambda p, x: p.relu(p.w), set()),
        (lambda p, x: p.inplace(p.w), {"w"}),
        (lambda p, x: p.block(p.w), {"w"}),
        (lambda p, x: p.norm(x), {"norm.running_mean"}),
        (lambda p, x: p.embed(p.ids), set()),
        (lambda p, x: p.renormed(p.ids), {"w"}),
    ],
    ids=["linear", "ReLU", "ReLU in place", "a block that has one", "BatchNorm", "embedding", "embedding that renorms"],
)
def test_what_a_module_called_as_a_whole_changes(call: Any, expected: set[str]) -> None:
    model = Model(call)

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, name: str) -> bool:
            return True

    assert written(fx.GraphModule(model, Tracer().trace(model)), model) == expected


def test_a_module_that_is_not_torchs_may_change_all_it_holds_and_gets() -> None:
    class Own(nn.Module):
        def __init__(self, w: nn.Parameter) -> None:
            super().__init__()
            self.w = w

        def forward(self, x: Tensor) -> Tensor:
            return x

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, name: str) -> bool:
            return True

    model = Model(lambda p, x: p.own(p.other))
    model.own = Own(model.w)
    assert written(fx.GraphModule(model, Tracer().trace(model)), model) == {"w", "other"}


def test_a_function_that_is_not_seen_may_change_what_it_gets() -> None:
    model = Model(lambda p, x: unseen(p.w).add_(unseen(x)))
    assert written(fx.symbolic_trace(model), model) == {"w"}


def test_a_higher_order_operator_may_change_what_it_gets() -> None:
    model = Model(lambda p, x: torch.utils.checkpoint.checkpoint(lambda y: y @ p.w, x, use_reentrant=False) @ p.other)
    capture = Capture()
    torch.compile(model, backend=capture, fullgraph=True)(torch.randn(8, 8))
    gm = capture.only.before
    writes = Writes(gm)
    names = {str(node.target): writes.first(node) is not None for node in gm.graph.find_nodes(op="placeholder")}
    assert [changed for name, changed in names.items() if name.endswith("parameters_w_")] == [True]
    assert [changed for name, changed in names.items() if "other" in name] == [False]


def test_the_first_and_the_count() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    h = graph.call_function(torch.add, (x, 1))
    first = graph.call_method("mul_", (h, 2))
    view = graph.call_method("view", (h, -1))
    second = graph.call_method("add_", (view, 2))
    third = graph.call_method("zero_", (y,))
    last = graph.call_function(torch.neg, (h,))
    graph.output(last)
    writes = Writes(fx.GraphModule({}, graph))
    assert [writes.first(node) for node in (h, view, first, x, y, last)] == [first, first, first, None, third, None]
    assert [writes.count(h, before) for before in (first, second, third, last)] == [0, 1, 2, 2]
    assert writes.count(x, last) == 1  # y may be a view of it
    assert writes.leave([x, last]) and not writes.leave([x, view])


def test_a_hook_may_give_anything_back() -> None:
    """Here the input, which is written to then."""

    class Hooked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 32)
            self.fc.register_forward_hook(lambda module, given, out: given[0])
            self.a, self.b = (nn.Parameter(torch.randn(32, 32) * 0.1) for _ in "ab")
            self.requires_grad_(False)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            x = x + 0
            first, same = F.linear(x, self.a), self.fc(x).add_(5)
            return first, F.linear(x, self.b), same

    model, x = Hooked(), torch.randn(8, 32)
    gm = fp8fx.convert(fx.symbolic_trace(model), (x,), freeze=True)
    for out, expected in zip(gm(x), model(x), strict=True):
        assert sqnr(expected, out) > 20
