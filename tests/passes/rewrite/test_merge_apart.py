"""merge: what must stay apart, by what the graph writes, by dtypes and modes, or by amaxes too far from each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fp8fx.config import Config
from fp8fx.convert import convert
from tests.support.capture import Capture, after
from tests.support.siblings import (
    PASSES,
    K,
    Siblings,
    assert_same_results,
    error,
    example,
    products,
    qkv,
    recipes,
    splits,
    widths,
)

# What must stay apart.


def test_nothing_is_merged_without_freeze() -> None:
    model, x = Siblings(qkv), example()
    rewrite = after(PASSES, model, (x,))
    assert [(r.name, r.count, r.modified) for r in rewrite.results[4:]] == [("merge", 0, False), ("freeze", 0, False)]
    assert len(products(rewrite.gm, "mixed")) == 3
    assert str(rewrite.gm.graph) == str(after(PASSES[:4], model, (x,)).gm.graph)


def test_one_linear_is_no_group() -> None:
    rewrite = after(PASSES, Siblings(lambda p, x: p.q(x) + p.k(torch.relu(x))), (example(),), freeze=True)
    assert (rewrite.results[4].count, rewrite.results[4].modified) == (0, False)
    assert len(products(rewrite.gm, "mixed")) == 2
    assert splits(rewrite.gm) == []


def test_weights_of_two_dtypes_stay_apart() -> None:
    model = Siblings(lambda p, x: p.q(x).float() + p.k(x.bfloat16()).float())
    model.k.bfloat16()
    capture = Capture(Config(freeze=True))
    x = example()

    def autocast(x: Tensor) -> Tensor:  # which takes weights of any dtype
        with torch.autocast("cpu", torch.bfloat16):
            return F.linear(x, model.q.weight) + F.linear(x, model.k.weight)

    with torch.no_grad():
        out = torch.compile(autocast, backend=capture, fullgraph=True)(x)
    assert len(products(capture.only.after, "mixed")) == 2
    torch.testing.assert_close(out, autocast(x), rtol=0.2, atol=0.2)


@pytest.mark.parametrize("mutate", ["method", "in-place activation", "out=", "through a view"])
def test_an_input_changed_between_two_siblings_is_read_twice(mutate: str) -> None:
    def forward(p: Siblings, x: Tensor) -> tuple[Tensor, Tensor]:
        h = x * 1
        q = p.q(h)
        if mutate == "method":
            h.add_(1)
        elif mutate == "in-place activation":
            F.relu(h, inplace=True)
        elif mutate == "out=":
            torch.add(x, 1, out=h)
        else:
            h.t().mul_(2)
        return q, p.k(h)

    model, x = Siblings(forward), example()
    new = convert(model, (x,), recipe="rowwise", freeze=True)
    for actual, expected in zip(new(x), convert(model, recipe="rowwise")(x), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda h: h,
    "a transpose": lambda h: h.t(),
    "the diagonal": lambda h: h.diagonal(),
    "windows": lambda h: h.unfold(0, 2, 2),
    "view_as": lambda h: h.view_as(torch.empty(4, K)),
    "as_strided": lambda h: torch.as_strided(h, (2, 3), (K, 1)),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("reads", ["what is viewed", "the view"])
def test_a_change_through_any_view_whose_result_is_used_counts(reads: str, view: str) -> None:
    def forward(p: Siblings, x: Tensor) -> tuple[Tensor, ...]:
        base = x * 1
        other = VIEWS[view](base)
        if reads == "what is viewed":
            read, changed = base, other
        else:  # a view with K columns again
            read, changed = torch.as_strided(other, (2, K), (K, 1)), base
        q = p.q(read)
        return q, p.k(read), changed.mul_(3).sum(), p.v(read)

    model, x = Siblings(forward), example()
    new, old = convert(model, (x,), recipe="rowwise", freeze=True), convert(model, recipe="rowwise")
    for actual, expected in zip(new(x), old(x), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("written", ["k.weight", "k.bias", "k.weight by a view"])
@pytest.mark.parametrize("first", [False, True], ids=["after the siblings", "before them"])
def test_a_sibling_whose_weight_or_bias_the_graph_writes_stays_apart(first: bool, written: str) -> None:
    def write(p: Siblings) -> None:
        if written == "k.weight by a view":
            p.k.weight.t()[:3].mul_(1.5)
        else:
            (p.k.bias if written == "k.bias" else p.k.weight).mul_(1.5)

    def forward(p: Siblings, x: Tensor) -> tuple[Tensor, ...]:
        if first:
            write(p)
        y = p.q(x), p.k(x), p.v(x)
        if not first:
            write(p)
        return y

    models, x = [Siblings(forward, biases=(True,) * 3) for _ in range(2)], example()
    new, old = convert(models[0], (x,), recipe="rowwise", freeze=True), convert(models[1], recipe="rowwise")
    assert [row.remark for row in new.meta["fp8fx_report"].rows] == [
        "one GEMM with v.weight",
        "" if written == "k.bias" else "not frozen: the graph writes it",
        "one GEMM with q.weight",
    ]
    before = old(x)
    assert all(torch.allclose(actual, expected, 1e-5, 1e-6) for actual, expected in zip(new(x), before, strict=True))
    assert_same_results(new, old, x)
    assert not torch.allclose(old(x)[1], before[1], 1e-3)


def test_what_else_the_graph_writes_keeps_no_siblings_apart() -> None:
    def forward(p: Siblings, x: Tensor) -> tuple[Tensor, ...]:
        h = x * 1
        q = p.q(h)
        q = q + torch.sum(q, 0, True) + p.kn.add_(1).sum()
        return q, p.k(h)

    model, x = Siblings(forward), example()
    new = convert(model, (x,), recipe="rowwise", freeze=True)
    assert widths(new) == [32]


def test_siblings_inside_and_outside_autocast_keep_their_dtypes() -> None:
    def forward(p: Siblings, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            q = p.q(x)
        return q, p.k(x)

    model, x = Siblings(forward), example()
    with torch.no_grad():
        out = torch.compile(model, backend=Capture(Config(freeze=True)), fullgraph=True)(x)
    assert [y.dtype for y in out] == [torch.bfloat16, torch.float32]


def test_siblings_inside_and_outside_no_grad_keep_their_history() -> None:
    def forward(p: Siblings, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            q = p.q(x)
        return q, p.k(x)

    model, x = Siblings(forward), example().requires_grad_()
    out = torch.compile(model, backend=Capture(Config(freeze=True)), fullgraph=True)(x)
    assert [y.requires_grad for y in out] == [False, True]


# Per-tensor scales.


def spread(ratio: float, **options: Any) -> tuple[Siblings, list[str], int]:
    """Three siblings, the middle one's weight `ratio` times larger; their remarks, and how many ops there are."""
    model = Siblings(qkv)
    for layer, amax in zip((model.q, model.k, model.v), (1.0, ratio, 1.0), strict=True):
        layer.weight.mul_(amax / layer.weight.abs().amax())
        layer.weight[0, 0] = amax
    new = convert(model, (example(),), freeze=True, **options)
    return model, [row.remark for row in new.meta["fp8fx_report"].rows], len(products(new, options["recipe"]))


@pytest.mark.parametrize("recipe", ["mixed", "global"])
@pytest.mark.parametrize("ratio", [100.0, 0.01], ids=str)
def test_amaxes_far_apart_stay_apart_where_a_tensor_has_one_scale(ratio: float, recipe: str) -> None:
    _, remarks, count = spread(ratio, recipe=recipe)
    assert count == 3
    for remark in remarks:
        assert "not merged with its siblings: their weights' amaxes differ by more than 64x" in remark
        assert "one GEMM with" not in remark


@pytest.mark.parametrize("recipe", ["mixed", "global"])
def test_the_limit_is_a_factor_of_64(recipe: str) -> None:
    assert [spread(ratio, recipe=recipe)[2] for ratio in (64.0, 65.0)] == [1, 3]


@pytest.mark.parametrize("recipe", ["mixed", "global"])
def test_the_amaxes_of_parts_are_their_own(recipe: str) -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qk, self.v = nn.Parameter(torch.randn(128, 64)), nn.Parameter(torch.randn(64, 64))
            with torch.no_grad():
                self.qk[64:].mul_(1e-3)

        def forward(self, x: Tensor) -> list[Tensor]:
            return [F.linear(x, w) for w in (self.qk.narrow(0, 64, 64), self.v)]

    new = convert(Parts().requires_grad_(False), (torch.randn(3, 64),), freeze=True, recipe=recipe)
    assert len(products(new, recipe)) == 2
    assert all("differ by more than 64x" in row.remark for row in new.meta["fp8fx_report"].rows)


def test_amaxes_far_apart_are_merged_where_each_row_has_its_scale() -> None:
    _, remarks, count = spread(100.0, recipe="rowwise")
    assert count == 1
    assert remarks == [
        "one GEMM with k.weight, v.weight",
        "one GEMM with q.weight, v.weight",
        "one GEMM with q.weight, k.weight",
    ]


def test_zeros_have_no_amax_to_compare() -> None:
    model, x = Siblings(qkv), example()
    model.k.weight.zero_()
    new = convert(model, (x,), freeze=True)  # merged or not
    q, k, v = new(x)
    assert not k.any()
    for y, layer in ((q, model.q), (v, model.v)):
        assert (y - layer(x)).norm() / layer(x).norm() < 0.06


def test_the_amaxes_are_those_of_now() -> None:
    model = Siblings(qkv)
    assert len(products(convert(model, freeze=True), "mixed")) == 1
    model.k.weight.mul_(1e4)
    assert len(products(convert(model, freeze=True), "mixed")) == 3


@recipes
@pytest.mark.parametrize("ratio", [1.0, 8.0, 60.0], ids=str)
def test_merging_costs_no_accuracy(ratio: float, recipe: str) -> None:
    model, x = nn.Module(), torch.randn(64, 256)
    model.q, model.k, model.v = nn.Linear(256, 200, bias=False), nn.Linear(256, 100), nn.Linear(256, 50, bias=False)
    model.requires_grad_(False)
    for layer, amax in zip((model.q, model.k, model.v), (1.0, ratio, ratio**0.5), strict=True):
        layer.weight.copy_(torch.randn(layer.weight.shape))
        layer.weight.mul_(amax / layer.weight.abs().amax())
    graph = fx.Graph()
    given = graph.placeholder("x")
    graph.output(tuple(graph.call_module(name, (given,)) for name in "qkv"))
    gm = fx.GraphModule(model, graph)
    merged, apart = convert(gm, (x,), recipe=recipe, freeze=True), convert(gm, recipe=recipe)
    assert len(products(merged, recipe)) == 1
    for layer, new, old in zip((model.q, model.k, model.v), merged(x), apart(x), strict=True):
        exact = F.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
        assert error(new, exact) <= 1.05 * error(old, exact)
