"""freeze: the weight of an FP8 op becomes an FP8 weight, and the graph forgets what it was made of."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from fp8fx.config import Config
from fp8fx.convert import convert
from fp8fx.errors import FreezeError
from fp8fx.ops.fp8_weight import FP8Weight
from fp8fx.passes.rewrite import check, decide, freeze, match, merge, replace
from fp8fx.recipes.quantize import quantize, sqnr
from fp8fx.recipes.recipe import RECIPES
from fp8fx.weights.converted_module import META, Source
from fp8fx.weights.store import STORE
from tests.support.capture import Capture, after, assert_same_graph, ops
from tests.support.functions_of_weights import Model, recipes

aten = torch.ops.aten
PASSES = (match, check, decide, replace, merge, freeze)


def op(recipe: str) -> Any:
    return getattr(torch.ops.fp8fx, f"matmul_fp8_{recipe}").default


def frozen(function: Callable[[Model, Tensor], Any], **options: Any) -> fx.GraphModule:
    return after(PASSES, Model(function), freeze=True, **options).gm


def weights(gm: fx.GraphModule) -> dict[str, FP8Weight]:
    return {name: p for name, p in gm.named_parameters() if isinstance(p, FP8Weight)}


@recipes
def test_the_graph(recipe: str) -> None:
    new = frozen(lambda p, x: torch.relu(F.linear(x, p.w, p.b)), recipe=recipe)
    graph = fx.Graph()
    x = graph.placeholder("x")
    weight, bias = (graph.get_attr(name) for name in ("w", "b"))
    product = graph.call_function(
        op(recipe), (x, graph.call_function(aten.t.default, (weight,)), 64, 64), {"bias": bias}
    )
    graph.output(graph.call_function(torch.relu, (product,)))
    assert_same_graph(new.graph, graph)
    assert isinstance(new.w, FP8Weight) and new.w.recipe == recipe


@recipes
@pytest.mark.parametrize(
    ("function", "weight", "name"),
    [
        (lambda p, x: p.fc(x), lambda p: p.fc.weight, "fc.weight"),
        (lambda p, x: F.linear(x, p.w), lambda p: p.w, "w"),
        (lambda p, x: x @ p.kn, lambda p: p.kn.t(), "kn"),
        (lambda p, x: torch.addmm(p.b, x, p.kn, alpha=2, beta=3), lambda p: p.kn.t(), "kn"),
        (lambda p, x: x @ p.w.t(), lambda p: p.w, "w"),
        (lambda p, x: x @ p.buffer.T, lambda p: p.buffer, "_tensor_constant0"),
        (lambda p, x: F.linear(x, p.kn.mT.contiguous().detach()), lambda p: p.kn.t(), "kn_frozen"),
        (lambda p, x: F.linear(x, p.w.view(2, 6, 8)[1]), lambda p: p.w[6:], "w_frozen"),
    ],
    ids=["nn.Linear", "F.linear", "@", "addmm", "w.t()", "buffer.T", "views", "half of a weight"],
)
def test_what_it_holds_is_the_weight_quantized_bit_for_bit(
    function: Callable[[Model, Tensor], Any], weight: Callable[[Model], Tensor], name: str, recipe: str
) -> None:
    new = frozen(function, recipe=recipe)
    forward = RECIPES[recipe].forward
    assert forward is not None
    expected = quantize(weight(Model(function)), forward.rhs, 64)
    assert weights(new).keys() == {name}
    held = new.get_parameter(name)
    assert isinstance(held, FP8Weight) and held.is_transposed is (name in ("kn", "_tensor_constant0"))
    data, scale = (held.qdata.mT, held.scale.mT) if held.is_transposed else (held.qdata, held.scale)
    assert expected.scale is not None
    assert torch.equal(data.view(torch.uint8), expected.data.view(torch.uint8))
    shape = (1, 1) if recipe == "global" else (len(data), 1)  # one a row where the GEMM takes one a row
    assert scale.shape == shape and torch.equal(scale, expected.scale.expand(shape))
    assert data.is_contiguous()
    assert not held.requires_grad
    # Of the FP8 weight; the original's views are gone.
    assert ops(new.graph)[aten.t.default] == (0 if held.is_transposed else 1)


def test_without_freeze_it_does_nothing() -> None:
    model = Model(lambda p, x: p.fc(x))
    rewrite = after(PASSES, model)
    assert (rewrite.results[-1].name, rewrite.results[-1].count, rewrite.results[-1].modified) == ("freeze", 0, False)
    assert rewrite.gm.code == after(PASSES[:4], model).gm.code
    assert META not in rewrite.gm.meta


def test_it_counts_ops() -> None:
    rewrite = after(PASSES, Model(lambda p, x: p.fc(x) + torch.relu(x) @ p.kn + x @ p.w.t()), freeze=True)
    assert [(r.name, r.count) for r in rewrite.results[-2:]] == [("merge", 2), ("freeze", 2)]
    assert len(weights(rewrite.gm)) == 2


def test_a_weight_that_two_linears_read_is_frozen_once() -> None:
    new = frozen(lambda p, x: F.linear(x, p.w) + F.linear(torch.relu(x), p.w) + torch.tanh(x) @ p.w.t())
    assert list(weights(new)) == ["w"]
    assert ops(new.graph)[op("mixed")] == 3


def test_two_readings_of_one_weight_are_two_frozen_ones() -> None:
    new = frozen(lambda p, x: F.linear(x, p.w[:8]) + F.linear(torch.relu(x), p.w[4:]))
    assert list(weights(new)) == ["w_frozen", "w_frozen_1"]
    assert not torch.equal(new.w_frozen.dequantize(), new.w_frozen_1.dequantize())


def test_names_that_are_taken_are_left_alone() -> None:
    model = Model(lambda p, x: F.linear(x, p.w[:12]) + p.w_frozen.sum())
    model.w, model.w_frozen = nn.Parameter(torch.randn(13, 8), requires_grad=False), nn.Parameter(torch.ones(3))
    new = after(PASSES, model, freeze=True).gm
    assert torch.equal(new.w_frozen, torch.ones(3))
    assert list(weights(new)) == ["w_frozen_1"]
    x = torch.randn(4, 8)
    assert torch.equal(new(x), op("mixed")(x, model.w[:12].t()) + 3)


def test_weights_take_the_place_of_their_originals() -> None:
    model = Model(lambda p, x: p.fc(x) + F.linear(torch.relu(x), p.buffer) + p.w.sum())
    new = after(PASSES, model, freeze=True).gm
    assert weights(new).keys() == {"fc.weight", "buffer"}
    assert new.w is model.w
    assert {"fc.bias", "w", "fc.weight", "buffer"} <= dict(new.named_parameters()).keys()
    assert "buffer" not in dict(new.named_buffers())
    account = new.meta[META]
    assert (account.made, account.sources, account.constants) == ({}, {}, {})  # nothing has another name


def test_what_has_another_name_remembers_of_what_it_is_made() -> None:
    model = Model(lambda p, x: F.linear(x, p.w[:8]))
    new = after(PASSES, model, freeze=True).gm
    assert "w" not in new.state_dict()
    account = new.meta[META]
    assert {name: made.sources for name, made in account.made.items()} == {"w_frozen": ("w",)}
    assert account.sources == {"w": Source(("w",), torch.Size((12, 8)))}


def test_a_weight_that_something_else_reads_stays() -> None:
    model = Model(lambda p, x: F.linear(x, p.w) * p.w.sum())
    new = after(PASSES, model, freeze=True).gm
    assert new.w is model.w
    assert list(weights(new)) == ["w_frozen"]
    x = torch.randn(4, 8)
    assert torch.equal(new(x), op("mixed")(x, model.w.t()) * model.w.sum())


def test_a_square_weight_that_is_read_along_both_dimensions_is_two() -> None:
    model = Model(lambda p, x: F.linear(x, p.square) + torch.relu(x) @ p.square)
    model.square = nn.Parameter(torch.randn(8, 8), requires_grad=False)
    new, x = after(PASSES, model, freeze=True).gm, torch.randn(4, 8)
    assert list(weights(new)) == ["square", "square_frozen"]
    expected = op("mixed")(x, model.square.t()) + op("mixed")(torch.relu(x), model.square)
    torch.testing.assert_close(new(x), expected, rtol=1e-5, atol=1e-5)  # which lies otherwise in memory


def test_autocasts_rounding_comes_before_the_scale() -> None:
    model = Model(lambda p, x: F.linear(x, p.w))

    def function(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    capture, x = Capture(Config(freeze=True)), torch.randn(4, 8)
    out = torch.compile(function, backend=capture, fullgraph=True)(x)
    forward = RECIPES["mixed"].forward
    assert forward is not None
    expected = quantize(model.w.bfloat16(), forward.rhs, 64)
    (entry,) = STORE.entries([model.w])
    assert torch.equal(entry.buffers[0].view(torch.uint8), expected.data.view(torch.uint8))
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, op("mixed")(x.bfloat16(), model.w.bfloat16().t()))


def test_two_graphs_of_dynamo_hold_one_tensor() -> None:
    model, capture = Model(lambda p, x: F.linear(x, p.w)), Capture(Config(freeze=True))
    compiled = torch.compile(model, backend=capture, dynamic=False)
    for m in (4, 5):
        compiled(torch.randn(m, 8))
    first, second = (graph.after for graph in capture.graphs)
    (entry,) = STORE.entries([model.w])
    for gm in (first, second):
        assert gm.get_submodule("frozen")(model.w) is entry.buffers
        assert META not in gm.meta  # the model has the originals


def test_an_input_stays_an_input() -> None:
    model, capture = Model(lambda p, x: p.fc(x)), Capture(Config(freeze=True))
    torch.compile(model, backend=capture)(torch.randn(4, 8))
    before, new = capture.only.before, capture.only.after
    assert [n.target for n in new.graph.find_nodes(op="placeholder")] == [
        n.target for n in before.graph.find_nodes(op="placeholder")
    ]
    (lookup,) = new.graph.find_nodes(op="call_module", target="frozen")
    (weight,) = lookup.args
    assert list(weight.users) == [lookup]


def test_a_weight_whose_value_is_not_known_is_quantized_at_each_call() -> None:
    w, x = nn.Parameter(torch.randn(12, 8), requires_grad=False), torch.randn(4, 8)
    gm = make_fx(lambda w, x: F.linear(x, w), tracing_mode="fake")(w, x)
    for node in gm.graph.find_nodes(op="placeholder")[:1]:
        node.meta["val"] = nn.Parameter(node.meta["val"], requires_grad=False)
    rewrite = after(PASSES, gm, freeze=True)
    assert rewrite.results[-1].count == 0
    ((remark,),) = rewrite.remarks.values()
    assert str(remark) == "not frozen: the weight's value is not known here"
    assert torch.equal(rewrite.gm(w, x), op("mixed")(x, w.t()))


def test_inside_a_higher_order_operator_the_weight_stays_and_the_report_says_so() -> None:
    model = Model(lambda p, x: checkpoint(lambda y: F.linear(y, p.w), x, use_reentrant=False))
    capture, x = Capture(Config(freeze=True)), torch.randn(4, 8, requires_grad=True)
    out = torch.compile(model, backend=capture, fullgraph=True)(x)
    assert torch.equal(out, op("mixed")(x, model.w.t()))
    (row,) = capture.only.report.rewritten
    assert row.remark == "not frozen: the weight's value is not known here"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@recipes
def test_a_weight_that_is_not_finite_is_refused_by_name(recipe: str, value: float) -> None:
    model = Model(lambda p, x: p.fc(x) + F.linear(x, p.w))
    model.fc.weight[3, 4] = value
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(
        FreezeError, match=r"fc\.weight.*: inf or NaN in a weight that was to be FP8; expected finite values"
    ):
        after(PASSES, model, freeze=True, recipe=recipe)
    assert all(
        torch.equal(
            x,
            before[name],
        )
        or name == "fc.weight"
        for name, x in model.state_dict().items()
    )


@recipes
def test_zeros_and_extremes_are_finite(recipe: str) -> None:
    model, x = Model(lambda p, x: F.linear(x, p.w)), torch.randn(4, 8)
    for weight in (torch.zeros(12, 8), torch.full((12, 8), torch.finfo(torch.float32).max), torch.full((12, 8), 1e-45)):
        model.w.copy_(weight)
        new = after(PASSES, model, freeze=True, recipe=recipe).gm
        assert torch.equal(
            new(x),
            op(recipe)(x, model.w.t()),
        )


def test_a_weight_that_is_trained_is_refused_in_grad_mode_alone() -> None:
    model = Model(lambda p, x: F.linear(x, p.w)).requires_grad_(True)
    message = (
        r"freeze=True, and w requires grad in grad mode; "
        r".*torch\.no_grad\(\) around the call, or model\.requires_grad_\(False\)"
    )
    with pytest.raises(FreezeError, match=message):
        after(PASSES, model, freeze=True)
    with torch.no_grad():
        assert after(PASSES, model, freeze=True).results[-1].count == 1
    model.requires_grad_(False)
    model.b.requires_grad_(True)  # which stays as it is
    assert after(PASSES, model, freeze=True).results[-1].count == 1


def test_an_excluded_weight_may_be_trained() -> None:
    model = Model(lambda p, x: F.linear(x, p.w) + torch.relu(x) @ p.kn)
    model.kn.requires_grad_(True)
    rewrite = after(PASSES, model, freeze=True, exclude="kn")
    x = torch.randn(4, 8)
    rewrite.gm(x).sum().backward()
    assert model.kn.grad is not None
    assert rewrite.results[-1].count == 1


def test_one_weight_seen_as_two_dtypes_is_two() -> None:
    def function(p: Model, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x.half(), p.bits), F.linear(x.bfloat16(), p.bits.view(torch.bfloat16))

    model, x = Model(function), torch.randn(3, 8)
    model.register_buffer("bits", torch.randn(12, 8).half())
    gm = convert(model, freeze=True)
    assert len(weights(gm)) == 2
    for expected, found in zip(model(x), gm(x), strict=True):
        assert sqnr(expected, found) > 20


def test_a_part_of_a_parameter_in_each_of_several_conversions() -> None:
    class Part(nn.Module):
        def __init__(self, w: nn.Parameter, row: int) -> None:
            super().__init__()
            self.w, self.row = w, row

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.w[self.row : self.row + 4])

    class Parts(nn.Module):
        def __init__(self, w: nn.Parameter) -> None:
            super().__init__()
            self.a, self.b, self.c = (Part(w, row) for row in (0, 4, 8))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return self.a(x), self.b(x), self.c(x)

    model, x = Parts(nn.Parameter(torch.randn(12, 8), requires_grad=False)), torch.randn(3, 8)
    gm = convert(model)
    expected = gm(x)
    gm = fx.symbolic_trace(model)
    for i, name in enumerate("abc"):
        gm = convert(gm, include=[name], freeze=True)
        assert len(weights(gm)) == i + 1
    for a, b in zip(expected, gm(x), strict=True):
        assert torch.equal(a, b)


def test_a_body_keeps_the_weight_that_it_reads() -> None:
    def body(root: nn.Module, read: bool) -> fx.GraphModule:
        graph = fx.Graph()
        y = graph.placeholder("y")
        result = (
            graph.call_function(aten.linear.default, (y, graph.get_attr("w")))
            if read
            else graph.call_function(aten.clone.default, (y,))
        )
        graph.output((result,))
        return fx.GraphModule(root, graph)

    root, x = nn.Module(), torch.randn(3, 8).abs()
    root.w = nn.Parameter(torch.randn(8, 8), requires_grad=False)
    root.yes, root.no = body(root, True), body(root, False)
    graph = fx.Graph()
    x_node = graph.placeholder("x")
    h = graph.call_function(aten.linear.default, (x_node, graph.get_attr("w")))
    positive = graph.call_function(aten.gt.Scalar, (graph.call_function(aten.sum.default, (x_node,)), 0))
    taken = graph.call_function(
        torch.ops.higher_order.cond, (positive, graph.get_attr("yes"), graph.get_attr("no"), (h,))
    )
    graph.output(graph.call_function(operator.getitem, (taken, 0)))
    gm = fx.GraphModule(root, graph)
    assert torch.equal(convert(gm, freeze=True)(x), convert(gm)(x))
