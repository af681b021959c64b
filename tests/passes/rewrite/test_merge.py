"""merge: frozen linears that read the same input become one GEMM, and nothing else about the graph changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounterWithBackend

from fp8fx.config import Config
from fp8fx.convert import convert
from fp8fx.executors import hardware
from fp8fx.graph.values import value
from fp8fx.ops.fp8_weight import FP8Weight
from tests.support.capture import Capture, after, ops
from tests.support.siblings import (
    PASSES,
    K,
    Siblings,
    assert_same_results,
    example,
    op,
    products,
    qkv,
    recipes,
    splits,
    widths,
)

aten = torch.ops.aten


# What becomes one GEMM.


@recipes
@pytest.mark.parametrize("biases", [(False,) * 3, (True,) * 3, (False, True, False), (True, False, True)], ids=str)
@pytest.mark.parametrize("n", [(16, 16, 16), (32, 8, 5)], ids=str)
def test_siblings_become_one_op_and_views_of_its_result(
    n: tuple[int, ...], biases: tuple[bool, ...], recipe: str
) -> None:
    model, x = Siblings(qkv, n, biases), example()
    rewrite = after(PASSES, model, (x,), recipe=recipe, freeze=True)
    merged = rewrite.results[4]
    assert (merged.name, merged.count, merged.modified) == ("merge", 3, True)
    (product,) = products(rewrite.gm, recipe)
    assert widths(rewrite.gm, recipe) == [sum(n)]
    assert splits(rewrite.gm) == [list(n)]
    assert ("bias" in product.kwargs) is any(biases)
    assert tuple(value(product).shape) == (4, sum(n))
    assert ops(rewrite.gm.graph)[aten.cat.default] == 0  # frozen, not computed at each call
    assert set(rewrite.ops.values()) == {product}
    # The values of the ops by themselves, their scale the largest of the three where there is one scale a tensor.
    weights, amax = [model.get_submodule(name) for name in "qkv"], None
    if recipe != "rowwise":
        amax = torch.stack([layer.weight.abs().amax() for layer in weights]).amax()
    for layer, out in zip(weights, rewrite.gm(x), strict=True):
        weight = layer.weight if amax is None else torch.cat([layer.weight, amax.expand(1, K)])
        bias = layer.bias if amax is None or layer.bias is None else F.pad(layer.bias, (0, 1))
        expected = op(recipe)(x, weight.t(), bias=bias)[:, : layer.out_features]
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_whole_numbers_come_out_bit_for_bit() -> None:
    # Scales of 1 and 2, and sums below 2**24: exact in any order. Only another FP8 value could make a difference.
    model, x = Siblings(qkv, (32, 8, 5), (True, False, True)), torch.randint(-8, 9, (6, K)).float()
    x[:, 0] = 448
    for layer in (model.q, model.k, model.v):
        layer.weight.copy_(torch.randint(-8, 9, layer.weight.shape))
        layer.weight[:, 1] = 896
    merged, old = convert(model, (x,), recipe="rowwise", freeze=True), convert(model, recipe="rowwise")
    assert len(products(merged)) == 1
    assert all(torch.equal(a, b) for a, b in zip(merged(x), old(x), strict=True))


FORMS: dict[str, Callable[[Siblings, Tensor], Any]] = {
    "modules": lambda p, x: (p.q(x), p.k(x)),
    "F.linear": lambda p, x: (F.linear(x, p.q.weight, p.q.bias), F.linear(x, p.k.weight)),
    "addmm": lambda p, x: (torch.addmm(p.q.bias, x, p.kn[:, :16]), x @ p.kn),
    "x @ w.t()": lambda p, x: (x @ p.q.weight.t(), x @ p.k.weight.T),
    "a mixture": lambda p, x: (p.q(x), x @ p.kn, torch.addmm(p.other.bias, x, p.other.weight.t())),
    "scaled afterwards": lambda p, x: (torch.addmm(p.q.bias, x, p.q.weight.t(), alpha=2, beta=3), p.k(x)),
    "einsum": lambda p, x: (
        torch.einsum("...k,nk", x, p.q.weight),
        torch.tensordot(x, p.kn, 1),
        torch.einsum("mk,nk", x, p.k.weight),
    ),
    "halves of one weight": lambda p, x: (F.linear(x, p.q.weight.chunk(2)[0]), F.linear(x, p.q.weight.chunk(2)[1])),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("known", [False, True], ids=["", "example inputs"])
def test_however_they_are_written(known: bool, form: str) -> None:
    model, x = Siblings(FORMS[form], biases=(True, True, True)), example()
    given = (x,) if known or form in ("addmm", "einsum") else None
    new = convert(model, given, recipe="rowwise", freeze=True)
    assert len(products(new)) == 1
    assert_same_results(new, convert(model, given, recipe="rowwise"), x)


@pytest.mark.parametrize("leading", [(4,), (2, 3), (1,), (1, 1), ()], ids=str)
def test_any_leading_dimensions(leading: tuple[int, ...]) -> None:
    model, x = Siblings(qkv, (8, 24, 16)), torch.randn(*leading, K)
    new = convert(model, (x,), recipe="rowwise", freeze=True)
    assert len(products(new)) == 1
    assert_same_results(new, convert(model, recipe="rowwise"), x)


def test_gate_and_up_of_dynamos_graph() -> None:
    model, x = Siblings(lambda p, x: F.silu(p.q(x)) * p.k(x), (24, 24)), example()
    capture = Capture(Config(recipe="rowwise", freeze=True))
    with torch.no_grad():
        out = torch.compile(model, backend=capture, fullgraph=True)(x)
    assert widths(capture.only.after) == [48]
    torch.testing.assert_close(out, convert(model, recipe="rowwise")(x), rtol=1e-5, atol=1e-6)


def test_exported_siblings_merge_too() -> None:
    model, x = Siblings(lambda p, x: p.q(x) * p.k(x), biases=(True, False)), example()
    for ep in (torch.export.export(model, (x,)), torch.export.export(model, (x,)).run_decompositions()):
        new = convert(ep, recipe="rowwise", freeze=True)
        assert len(products(new)) == 1
        assert_same_results(new, convert(ep, recipe="rowwise"), x)


def test_another_reader_of_the_input_makes_no_difference() -> None:
    model, x = Siblings(lambda p, x: torch.relu(x) + p.q(x) + x.sum() + p.k(x) * x), example()
    new = convert(model, (x,), recipe="rowwise", freeze=True)
    assert len(products(new)) == 1
    assert_same_results(new, convert(model, recipe="rowwise"), x)


def test_a_reader_between_two_siblings_makes_no_difference() -> None:
    # k's weight and bias are read after what q's result goes into.
    def between(p: Siblings, x: Tensor) -> Tensor:
        h = torch.relu(p.q(x))
        h = p.other(h)
        return h * F.linear(x, p.k.weight, p.k.bias)

    model, x = Siblings(between, biases=(True, True)), example()
    for gm in (fx.symbolic_trace(model), torch.export.export(model, (x,)).module()):
        new = convert(gm, recipe="rowwise", freeze=True)
        assert sorted(widths(new)) == [16, 32]
        assert_same_results(new, convert(gm, recipe="rowwise"), x)


def test_each_group_of_siblings_is_its_own() -> None:
    model, x = Siblings(lambda p, x: (h := p.q(x) * p.k(x), p.v(h) + p.other(h))[1]), example()
    new = convert(model, (x,), recipe="rowwise", freeze=True)
    assert widths(new) == [32, 32]
    assert_same_results(new, convert(model, recipe="rowwise"), x)


def test_an_excluded_sibling_stays_as_it_is() -> None:
    model, x = Siblings(qkv), example()
    new = convert(model, (x,), recipe="rowwise", freeze=True, exclude="k")
    assert widths(new) == [32]
    assert ops(new.graph)["k"] == 1
    assert_same_results(new, convert(model, recipe="rowwise", exclude="k"), x)


def test_one_weight_read_twice_is_kept_once() -> None:
    model, x = Siblings(lambda p, x: p.q(x) + torch.relu(p.q(x))), example()
    new = convert(model, (x,), recipe="rowwise", freeze=True)
    assert_same_results(new, convert(model, recipe="rowwise"), x)
    assert sum(p.numel() for p in new.parameters() if isinstance(p, FP8Weight)) == K * K


# Report, dynamic shapes, decisions.


def test_the_report_has_a_row_for_each_by_its_own_name() -> None:
    model = Siblings(lambda p, x: p.q(x) + p.k(x) + p.other(torch.relu(x)), (16, 16), (True, False))
    rows = convert(model, (example(),), freeze=True).meta["fp8fx_report"].rows
    assert [(row.path, row.name, row.m, row.k, row.n, row.reason) for row in rows] == [
        (name, f"{name}.weight", "4", "16", "16", None) for name in ("q", "k", "other")
    ]
    assert [row.remark for row in rows] == ["one GEMM with k.weight", "one GEMM with q.weight", ""]


def test_names_in_dynamos_report_are_the_models_own() -> None:
    model = nn.Sequential(Siblings(lambda p, x: p.q(x) + p.k(x)))
    capture = Capture(Config(freeze=True))
    torch.compile(model, backend=capture)(example())
    assert [(row.name, row.remark) for row in capture.only.report.rows] == [
        ("0.q.weight", "one GEMM with 0.k.weight"),
        ("0.k.weight", "one GEMM with 0.q.weight"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "automatic"])
def test_a_varying_batch_is_compiled_no_more_often_than_unfrozen(dynamic: bool | None) -> None:
    def heads(y: Tensor) -> Tensor:
        return y.view(y.shape[0], y.shape[1], 4, 4).transpose(1, 2)

    model = Siblings(lambda p, x: (heads(p.q(x)) * heads(p.k(x)), p.v(x).view(-1)), biases=(True, False, True))
    counts, old = [], convert(model, recipe="rowwise")
    for frozen in (True, False):
        torch._dynamo.reset()
        capture = Capture(Config(recipe="rowwise", freeze=frozen))
        counter = CompileCounterWithBackend(capture)
        compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=dynamic)
        for batch, length in ((2, 3), (2, 5), (3, 5), (7, 2), (4, 1), (1, 6), (2, 0)):
            x = example(batch, length)
            for actual, expected in zip(compiled(x), old(x), strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
        assert {len(products(graph.after)) for graph in capture.graphs} == {1 if frozen else 3}
        counts.append(counter.frame_count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("rows", [1, 8])
def test_merged_siblings_keep_what_was_decided_for_each(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "has_fp8_tensor_cores", lambda device: True)
    with torch.no_grad():
        new = convert(Siblings(qkv), (example(rows),), recipe="rowwise", freeze=True, profit="always")
    (product,) = products(new)
    assert product.kwargs.get("weight_only", False) is (rows == 1)
    assert widths(new) == [48]
