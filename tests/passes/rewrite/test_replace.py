"""replace: every match left becomes one FP8 matmul op, exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fp8fx.graph.values import fake
from fp8fx.passes.rewrite import check, match, replace
from fp8fx.recipes.quantize import sqnr
from tests.support.capture import after, assert_same_graph, ops

aten = torch.ops.aten
mixed = torch.ops.fp8fx.matmul_fp8_mixed.default
t = aten.t.default
PASSES = (match, check, replace)


class Model(nn.Module):
    """Some weights and a function of them as its forward."""

    def __init__(self, function: Callable[[Model, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.fc = nn.Linear(8, 8)
        self.w = nn.Parameter(torch.randn(8, 8))
        self.b = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def replaced(function: Callable[[Model, Tensor], Any], x: Tensor | None = None, **options: Any) -> fx.GraphModule:
    return after(PASSES, Model(function), None if x is None else (x,), **options).gm


def expected(function: Callable[[Model, Tensor], Any]) -> fx.Graph:
    return fx.symbolic_trace(Model(function)).graph


def test_count() -> None:
    rewrite = after(PASSES, Model(lambda p, x: p.fc(x) + x @ p.w + x @ x))
    assert [(r.name, r.count, r.modified) for r in rewrite.results] == [
        ("match", 2, False),
        ("check", 0, False),
        ("replace", 2, True),
    ]
    counts = ops(rewrite.gm.graph)
    assert (counts[mixed], counts[torch.matmul], counts["fc"]) == (2, 0, 0)
    assert counts[torch.ops.aten.t.default] == 1


def test_no_match_leaves_the_graph_unchanged() -> None:
    gm = fx.symbolic_trace(Model(lambda p, x: x @ x))
    rewrite = after(PASSES, gm)
    assert (rewrite.results[-1].count, rewrite.results[-1].modified) == (0, False)
    assert rewrite.gm.code == gm.code


class Only:
    """A pass that keeps one match."""

    __name__ = "only"
    CHANGES = False
    NEEDS = ()

    def __init__(self, name: str) -> None:
        self.name = name

    def run(self, rewrite: Any) -> int:
        rewrite.matches = [m for m in rewrite.matches if m.name == self.name]
        return 0


def test_only_what_is_left_is_replaced() -> None:
    model = Model(lambda p, x: p.fc(x) @ p.w)
    assert after([match, replace], model).results[-1].count == 2
    rewrite = after([match, Only("w"), replace], model)
    assert rewrite.results[-1].count == 1
    assert [n.target for n in rewrite.gm.graph.nodes if n.op.startswith("call_")] == ["fc", mixed]


def test_several_users() -> None:
    new = replaced(lambda p, x: (lambda y: (y + 1, y * y, y))(p.fc(x)))
    (node,) = new.graph.find_nodes(op="call_function", target=mixed)
    assert len(node.users) == 3
    assert_same_graph(
        new.graph,
        expected(lambda p, x: (lambda y: (y + 1, y * y, y))(mixed(x, t(p.fc.weight), 64, 64, bias=p.fc.bias))),
    )


def test_one_input_of_several_linears() -> None:
    def by_hand(p: Model, x: Tensor) -> tuple[Tensor, ...]:
        return mixed(x, t(p.fc.weight), 64, 64, bias=p.fc.bias), mixed(x, t(p.w), 64, 64), mixed(x, p.w, 64, 64)

    new = replaced(lambda p, x: (p.fc(x), F.linear(x, p.w), x @ p.w))
    assert_same_graph(new.graph, expected(by_hand))


def test_a_chain_of_linears() -> None:
    def chain(p: Model, x: Tensor) -> Tensor:
        return p.fc(p.fc(p.fc(x)))

    def by_hand(p: Model, x: Tensor) -> Tensor:
        for _ in range(3):
            x = mixed(x, t(p.fc.weight), 64, 64, bias=p.fc.bias)
        return x

    x = torch.randn(4, 8)
    for example in (None, x):
        new = replaced(chain, example)
        assert_same_graph(new.graph, expected(by_hand))
        assert torch.equal(new(x), Model(by_hand)(x))


def test_a_chain_through_every_operand() -> None:
    """A linear whose addend is a linear, whose input is one."""

    def chain(p: Model, x: Tensor) -> Tensor:
        y = p.fc(x)
        return torch.addmm(y, y, p.w)

    def by_hand(p: Model, x: Tensor) -> Tensor:
        y = mixed(x, t(p.fc.weight), 64, 64, bias=p.fc.bias)
        z = mixed(y, p.w, 64, 64)
        return aten.add.Tensor(z, aten.type_as.default(y, z))

    x = torch.randn(4, 8)
    new = replaced(chain)
    assert_same_graph(new.graph, expected(by_hand))
    assert torch.equal(new(x), Model(by_hand)(x))


def test_a_linear_that_feeds_what_is_no_linear() -> None:
    new = replaced(lambda p, x: p.fc(x) @ p.fc(x).mT)
    assert ops(new.graph)[mixed] == 2
    x = torch.randn(4, 8)
    y = mixed(x, (fc := Model(lambda p, x: x).fc).weight.t(), 64, 64, bias=fc.bias)
    assert torch.equal(new(x), y @ y.mT)


def test_numerics_over_the_whole_output() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256))
    x = torch.randn(64, 256)
    for recipe in ("mixed", "global"):
        new = after(PASSES, model, recipe=recipe).gm
        # Two E4M3 matmuls in a row, each at about 28.5 dB.
        assert 24 < sqnr(model(x), new(x)) < 30


@pytest.mark.parametrize(("recipe", "executor"), [("mixed", "auto"), ("global", "auto"), ("mixed", "simulated")])
def test_recipe_and_executor(recipe: str, executor: str) -> None:
    new = replaced(lambda p, x: x @ p.w, recipe=recipe, executor=executor)
    op = getattr(torch.ops.fp8fx, f"matmul_fp8_{recipe}").default
    named = {} if executor == "auto" else {"executor": executor}
    assert_same_graph(new.graph, expected(lambda p, x: op(x, p.w, 64, 64, **named)))


@pytest.mark.parametrize(
    ("k", "n", "bsz", "bsz2"),
    [
        (1, 1, 64, 64),
        (64, 65, 64, 128),
        (65, 64, 128, 64),
        (128, 129, 128, 256),
        (1024, 1025, 1024, 2048),
        (4096, 4097, 4096, 4096),
        (5000, 2, 4096, 64),
    ],
)
def test_block_sizes_come_from_the_shapes(k: int, n: int, bsz: int, bsz2: int) -> None:
    new = after(PASSES, nn.Sequential(nn.Linear(k, n, device="meta"))).gm
    (node,) = new.graph.find_nodes(op="call_function", target=mixed)
    assert node.args[2:] == (bsz, bsz2)


@pytest.mark.parametrize(
    ("bias", "fused"),
    [
        (torch.randn(8), True),
        (torch.randn(1, 8), False),
        (torch.randn(4, 8), False),
        (torch.randn(4, 1), False),
        (torch.randn(1), False),
        (torch.randn(()), False),
    ],
    ids=lambda b: str(tuple(b.shape)) if isinstance(b, Tensor) else "",
)
def test_which_addends_the_op_takes(bias: Tensor, fused: bool) -> None:
    model = Model(lambda p, x: torch.addmm(p.b, x, p.w))
    model.b = nn.Parameter(bias)
    x = torch.randn(4, 8)
    new = after(PASSES, model).gm
    (node,) = new.graph.find_nodes(op="call_function", target=mixed)
    assert ("bias" in node.kwargs) is fused
    assert ops(new.graph)[aten.add.Tensor] == (not fused)
    y = mixed(x, model.w, 64, 64, bias=bias) if fused else mixed(x, model.w, 64, 64) + bias
    assert torch.equal(new(x), y)


def test_a_computed_bias_is_fused_where_its_shape_is_known() -> None:
    def function(p: Model, x: Tensor) -> Tensor:
        return F.linear(x, p.w, x.sum(0))

    x = torch.randn(4, 8)
    unknown, known = replaced(function), replaced(function, x)
    assert ops(unknown.graph)[aten.add.Tensor] == 1
    assert ops(known.graph)[aten.add.Tensor] == 0
    w = Model(function).w
    assert torch.equal(known(x), mixed(x, w.t(), 64, 64, bias=x.sum(0)))
    assert torch.equal(unknown(x), mixed(x, w.t(), 64, 64) + x.sum(0))


def test_beta_0_drops_the_addend_whatever_is_in_it() -> None:
    model = Model(lambda p, x: torch.addmm(p.b, x, p.w, beta=0))
    model.b = nn.Parameter(torch.full((8,), torch.nan))
    x = torch.randn(4, 8)
    assert torch.equal(after(PASSES, model).gm(x), mixed(x, model.w, 64, 64))


@pytest.mark.parametrize(
    "function", [lambda p, x: torch.addmm(p.fc.weight, x, p.w), lambda p, x: torch.addmm(p.b, x, p.w, alpha=2, beta=3)]
)
def test_autocast_casts_the_addend_too(function: Callable[[Model, Tensor], Tensor]) -> None:
    x, model = torch.randn(8, 8), Model(function)
    new = after(PASSES, model).gm
    with torch.autocast("cpu", torch.bfloat16):
        assert new(x).dtype == model(x).dtype == torch.bfloat16
        assert sqnr(model(x), new(x)) > 24


def test_meta_of_the_new_nodes() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Model(lambda p, x: torch.addmm(x, p.fc(x), p.w, alpha=2))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    x = torch.randn(8, 8)
    tracer, model = fx.Tracer(), Outer()
    tracer.record_stack_traces = True
    old = fx.GraphModule(model, tracer.trace(model))
    rewrite = after(PASSES, old, (x,))
    came_from = {match.node.name: match.node.meta for match in rewrite.matches}
    new = [n for n in rewrite.gm.graph.nodes if n.name not in {o.name for o in old.graph.nodes}]
    assert [n.target for n in new] == [
        "inner.fc.weight",
        t,
        "inner.fc.bias",
        mixed,
        mixed,
        aten.mul.Tensor,
        aten.type_as.default,
        aten.add.Tensor,
    ]
    for node in new:
        origin = came_from["inner_fc" if node in new[:4] else "addmm"]
        assert node.meta["nn_module_stack"] == origin["nn_module_stack"]
        assert node.meta["stack_trace"] == origin["stack_trace"]
    assert [tuple(fake(n).shape) for n in new if n.target in (mixed, aten.mul.Tensor, aten.add.Tensor)] == [(8, 8)] * 4  # type: ignore[union-attr]
