"""freeze: a weight that the graph writes is quantized at each call, and follows what is written."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fp8fx
from fp8fx.config import Config
from fp8fx.convert import convert
from fp8fx.recipes.quantize import sqnr
from fp8fx.report import Report
from tests.support.capture import Capture
from tests.support.functions_of_weights import Model, Written, recipes

WRITTEN = "not frozen: the graph writes it"


def after_writing(write: Callable[[Written, Tensor], Any]) -> Callable[[Written, Tensor, Tensor], Any]:
    """A linear by the weight, behind the write and before the next one."""
    return lambda p, x, k: (write(p, k), F.linear(x, p.w))[1]


def before_writing(write: Callable[[Written, Tensor], Any]) -> Callable[[Written, Tensor, Tensor], Any]:
    return lambda p, x, k: (F.linear(x, p.w), write(p, k))[0]


def set_part(p: Written, k: Tensor) -> None:
    p.w[2:, 3] = k[0, 2:, 0]


WRITES: dict[str, Callable[[Written, Tensor], Any]] = {
    "mul_": lambda p, k: p.w.mul_(1.5),
    "copy_": lambda p, k: p.w.copy_(k[0]),
    "setitem": set_part,
    "a transpose": lambda p, k: p.w.t().copy_(k[0]),
    "a flat view": lambda p, k: p.w.view(-1).add_(1),
    "another tensor of its memory": lambda p, k: p.part.mul_(3),
    "out=": lambda p, k: torch.add(k[0], 1, out=p.w),
    "index_copy_": lambda p, k: p.w.index_copy_(0, p.ids, k[0, :2]),
    "a list": lambda p, k: torch._foreach_mul_([p.w], 1.5),
    "a custom op's second argument": lambda p, k: add_to_second(k[0], p.w),
    "a module in place": lambda p, k: p.act(p.w.t()),
    "an embedding that renorms": lambda p, k: p.embed(p.ids).sum(),
}


@torch.library.custom_op("fp8fx_tests::add_to_second", mutates_args=("y",))
def add_to_second(x: Tensor, y: Tensor) -> Tensor:
    y.add_(x)
    return x.clone()


@add_to_second.register_fake
def _(x: Tensor, y: Tensor) -> Tensor:
    return torch.empty_like(x)


def held(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in (*model.named_parameters(), *model.named_buffers())}


def calls(model: nn.Module, gm: Callable[..., Any]) -> list[Any]:
    """Of three calls, the results and what the model holds then; after what it holds at first."""
    torch.manual_seed(1)
    inputs = [torch.randn(2, 3, 16, 16, dtype=torch.bfloat16).unbind() for _ in range(3)]
    return [(torch.empty(0), held(model)), *((gm(x, k), held(model)) for x, k in inputs)]


def converted(way: str, function: Any, recipe: str, freeze: bool) -> tuple[list[Any], Report]:
    """Three calls of a model of its own, captured this way and rewritten."""
    model = Written(function)
    if way == "compile":
        backend = Capture(Config(freeze=freeze, recipe=recipe))
        return calls(model, torch.compile(model, backend=backend, fullgraph=True)), backend.only.report
    x = torch.randn(3, 16, 16, dtype=torch.bfloat16)
    if way == "trace":
        gm = convert(model, (x, x), freeze=freeze, recipe=recipe)
        return calls(gm, gm), gm.meta["fp8fx_report"]
    kept = copy.deepcopy(model.state_dict())
    gm = convert(torch.export.export(model, (x, x)), freeze=freeze, recipe=recipe)
    gm.load_state_dict(kept, strict=False)
    return calls(gm, gm), gm.meta["fp8fx_report"]


def assert_follows_the_writes(way: str, function: Any, recipe: str = "mixed") -> Report:
    (new, report), (old, _) = (converted(way, function, recipe, freeze) for freeze in (True, False))
    for (actual, state), (expected, reference) in zip(new, old, strict=True):
        assert torch.equal(actual, expected)
        for name in state.keys() & reference.keys():
            assert torch.equal(state[name], reference[name]), name
    assert any(not torch.equal(x, new[1][1][name]) for name, x in new[0][1].items())  # it does write
    return report


@pytest.mark.parametrize(
    ("way", "write"), [("compile", write) for write in WRITES] + [("trace", w) for w in WRITES if w != "setitem"]
)
@pytest.mark.parametrize("order", [after_writing, before_writing], ids=["read after", "read before"])
def test_a_weight_that_the_graph_writes_is_quantized_at_each_call(way: str, order: Any, write: str) -> None:
    report = assert_follows_the_writes(way, order(WRITES[write]))
    (row,) = report.rewritten
    assert row.remark == WRITTEN


@pytest.mark.parametrize("write", ["mul_", "a transpose", "index_copy_", "a custom op's second argument"])
def test_a_weight_that_an_exported_graph_writes_after_it_was_read(write: str) -> None:
    (row,) = assert_follows_the_writes("export", before_writing(WRITES[write])).rewritten
    assert row.remark == WRITTEN


FORMS: dict[str, Callable[[Written, Tensor, Tensor], Any]] = {
    "a module": lambda p, x, k: (p.fc.weight.mul_(1.5), p.fc(x))[1],
    "x @ w": lambda p, x, k: (x @ p.w, p.w.copy_(k[0]))[0],
    "a part": lambda p, x, k: (F.linear(x, p.w[8:]), p.w[8:].add_(1))[0],
    "a copy": lambda p, x, k: (c := p.w.clone(), c.mul_(p.ids.add_(1)[0]), F.linear(x, c))[2],
    "a buffer": lambda p, x, k: (F.linear(x, p.kv[0]), p.kv.index_copy_(2, p.ids, k[:, :, :2]))[0],
    "batched": lambda p, x, k: (torch.bmm(x, p.kv.mT), p.kv.copy_(k))[0],
    "grouped": lambda p, x, k: (
        F.grouped_mm(x[0], p.kv, offs=torch.tensor([2, 9, 16], dtype=torch.int32)),
        p.kv.mul_(2),
    )[0],
}


@recipes
@pytest.mark.parametrize("form", FORMS)
def test_however_it_is_read(form: str, recipe: str) -> None:
    (row,) = assert_follows_the_writes("compile", FORMS[form], recipe).rewritten
    assert row.remark == WRITTEN


def test_a_graph_that_a_higher_order_operator_is_in() -> None:
    def inside(p: Written, x: Tensor) -> Tensor:
        p.w.mul_(1.5)
        return x + 1

    region = torch.compiler.nested_compile_region(inside)
    report = assert_follows_the_writes("compile", lambda p, x, k: F.linear(region(p, x), p.w))
    assert [row.remark for row in report.rewritten] == [WRITTEN]


@pytest.mark.compiles
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "function",
    [
        lambda p, x: F.linear(x, p.w, p.b + torch.randn_like(p.b)),
        lambda p, x: F.linear(x, p.w[torch.randint_like(p.rows, 12)]),
    ],
    ids=["bias", "rows"],
)
def test_what_is_drawn_at_random_is_drawn_in_each_call(
    function: Callable[[Model, Tensor], Tensor], compiled: bool
) -> None:
    model, x = Model(function), torch.randn(3, 8)
    model.register_buffer("rows", torch.arange(12))
    with torch.no_grad():
        call = (
            torch.compile(model, backend="fp8", options={"freeze": True}) if compiled else convert(model, freeze=True)
        )
        assert not torch.equal(call(x), call(x))


@pytest.mark.compiles
def test_a_weight_that_is_written_through_an_input_is_quantized_at_each_call() -> None:
    fc, x = nn.Linear(8, 12).requires_grad_(False), torch.randn(3, 8)

    def call(x: Tensor, alias: Tensor) -> Tensor:
        alias.mul_(2)
        return fc(x)

    backend = fp8fx.Backend(Config(freeze=True))
    with torch.no_grad():
        y = torch.compile(call, backend=backend)(x, fc.weight.view(-1))
    assert sqnr(fc(x), y) > 20
    assert backend.reports[0].rows[0].remark == "not frozen: the graph writes it"
