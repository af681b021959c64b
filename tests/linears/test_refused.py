"""What is no linear, or none that can be rewritten, is left as it is, and the report says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import fp8fx
from fp8fx.convert import convert
from fp8fx.graph.constants import constants
from fp8fx.graph.propagate import propagate
from fp8fx.linears.forms import FORMS
from fp8fx.linears.matches import MatmulMatch, Refusal
from fp8fx.linears.recognise import match_node
from fp8fx.linears.site import NodeKinds
from tests.support.capture import Capture
from tests.support.refusals import ACTIVATIONS, COMPUTED, Model, only_refusal

LEFT = "the weight is on the left of a linear or a sum"
UNKNOWN = "the input's shape is not known; pass example inputs"
HIDDEN = "a fused call that hides its linears"
CHAIN = "a chain of matmuls, whose order torch chooses"
IN_PLACE = "the result is added to a tensor in place"
BILINEAR = "each product is of two inputs and a weight"

# name: the function, its form in the report, the reason.
REFUSED: dict[str, tuple[Callable[[Model, Tensor], Any], str, str]] = {
    "activation @ activation": (lambda p, x: x @ x.mT, "@", ACTIVATIONS),
    "matmul of activations": (lambda p, x: torch.matmul(x.mT, x), "matmul", ACTIVATIONS),
    "Tensor.matmul of activations": (lambda p, x: x.matmul(x.mT), ".matmul", ACTIVATIONS),
    "bmm of activations": (lambda p, x: torch.bmm(x, x.mT), "bmm", ACTIVATIONS),
    "Tensor.bmm of activations": (lambda p, x: x.bmm(x.mT), ".bmm", ACTIVATIONS),
    "baddbmm of activations": (lambda p, x: torch.baddbmm(p.b, x, x.mT), "baddbmm", ACTIVATIONS),
    "Tensor.baddbmm of activations": (lambda p, x: x.baddbmm(x, x.mT, beta=0.5), ".baddbmm", ACTIVATIONS),
    "addmm of activations": (lambda p, x: torch.addmm(p.b, x[0], x[1]), "addmm", ACTIVATIONS),
    "bmm, the weights on the left": (lambda p, x: torch.bmm(p.experts, x), "bmm", "the weight is 3-D, not 2-D"),
    "addmm, the weight on the left": (lambda p, x: torch.addmm(p.b, p.w, x[0]), "addmm", LEFT),
    "linear, the weight as the input": (lambda p, x: F.linear(p.w, x[0]), "F.linear", LEFT),
    "a scaled weight": (lambda p, x: F.linear(x, p.w * 2), "F.linear", COMPUTED),
    "concatenated weights": (lambda p, x: F.linear(x, torch.cat([p.w, p.w])), "F.linear", COMPUTED),
    "an activation as linear's weight": (lambda p, x: F.linear(x, x[0]), "F.linear", COMPUTED),
    "experts, gathered": (
        lambda p, x: torch.bmm(x, p.experts[p.index % 4][:4]),
        "bmm",
        "the weight is gathered by an index",
    ),
    "cast to float32": (lambda p, x: F.linear(x.float(), p.w.float()), "F.linear", COMPUTED),
    "einsum of activations": (lambda p, x: torch.einsum("bij,bkj->bik", x, x), "einsum", ACTIVATIONS),
    "einsum, a batched weight": (
        lambda p, x: torch.einsum("bij,bjk->bik", x, p.experts),
        "einsum",
        "the weight is batched",
    ),
    "einsum of three": (
        lambda p, x: torch.einsum("bij,jk,kl->bil", x, p.w, p.w),
        "einsum",
        "3 operands, or one that is not computed in the graph",
    ),
    "einsum of a diagonal": (lambda p, x: torch.einsum("bij,jj->bi", x, p.w), "einsum", "a diagonal is taken"),
    "einsum over rows too": (
        lambda p, x: torch.einsum("bij,jk->bk", x, p.w),
        "einsum",
        "a dimension is summed that only one operand has",
    ),
    "einsum with a weight of size 1": (
        lambda p, x: torch.einsum("bij,jk->bik", x[..., :1], p.w[:1]),
        "einsum",
        "what is contracted has size 1",
    ),
    "einsum of a computed weight": (lambda p, x: torch.einsum("bij,jk->bik", x, 2 * p.w), "einsum", COMPUTED),
    "tensordot of activations": (lambda p, x: torch.tensordot(x, x, 3), "tensordot", ACTIVATIONS),
    "a sum of weights on the right": (lambda p, x: x @ (p.w + p.w.t()), "@", COMPUTED),
    "3-D weight, 4-D input": (lambda p, x: x[None] @ p.experts, "@", "the weight is 3-D, not 2-D"),
    "baddbmm with 3-D weight": (
        lambda p, x: torch.baddbmm(p.b, x, p.experts.mT),
        "baddbmm",
        "the weight is 3-D, not 2-D",
    ),
    "1-D weight": (lambda p, x: x @ p.b, "@", "the weight is 1-D, not 2-D"),
    "addmv, a 1-D weight": (lambda p, x: torch.addmv(p.b, x[0], p.b), "addmv", "the weight is 1-D, not 2-D"),
    "addmv of activations": (lambda p, x: torch.addmv(p.b, x[0], x[1, 0]), "addmv", ACTIVATIONS),
    "addbmm": (lambda p, x: torch.addbmm(p.b, x[:, :3], p.experts), "addbmm", "the products of a batch are summed"),
    "Tensor.addbmm of activations": (lambda p, x: p.w.addbmm(x, x.mT), ".addbmm", ACTIVATIONS),
    "addmm_": (lambda p, x: (x[0] + 1).addmm_(x[1], p.w), ".addmm_", IN_PLACE),
    "addmv_": (lambda p, x: (x[0, 0] + 1).addmv_(p.w, x[0, 1]), ".addmv_", IN_PLACE),
    "baddbmm_": (lambda p, x: (x + 1).baddbmm_(x, p.experts), ".baddbmm_", IN_PLACE),
    "addbmm_": (lambda p, x: (x[0] + 1).addbmm_(x, p.experts, beta=0.5), ".addbmm_", IN_PLACE),
    "addmm_ of activations": (lambda p, x: (x[0] + 1).addmm_(x[1], x[2]), ".addmm_", ACTIVATIONS),
    "inner of activations": (lambda p, x: torch.inner(x, x[0]), "inner", ACTIVATIONS),
    "inner of a computed weight": (lambda p, x: x.inner(2 * p.w), ".inner", COMPUTED),
    "linalg.matmul of activations": (lambda p, x: torch.linalg.matmul(x, x), "linalg.matmul", ACTIVATIONS),
    "multi_dot": (lambda p, x: torch.linalg.multi_dot([x[0], p.w, p.w.t()]), "multi_dot", CHAIN),
    "chain_matmul": (lambda p, x: torch.chain_matmul(x[0], p.w, p.w.t()), "chain_matmul", CHAIN),
    "bilinear": (lambda p, x: F.bilinear(x, x + 1, p.experts, p.b[:4]), "bilinear", BILINEAR),
    "lstm_cell": (
        lambda p, x: torch.lstm_cell(x[0], (x[1], x[2]), p.experts.view(32, 8), p.experts.view(32, 8))[0],
        "lstm_cell",
        HIDDEN,
    ),
    "gru_cell": (
        lambda p, x: torch.gru_cell(x[0], x[1], p.experts.view(32, 8)[:24], p.experts.view(32, 8)[8:]),
        "gru_cell",
        HIDDEN,
    ),
    "rnn_tanh_cell": (
        lambda p, x: torch.rnn_tanh_cell(x[0], x[1], p.w, p.fc.weight, p.b, p.b),
        "rnn_tanh_cell",
        HIDDEN,
    ),
    "rnn_relu_cell": (lambda p, x: torch.rnn_relu_cell(x[0], x[1], p.w, p.fc.weight), "rnn_relu_cell", HIDDEN),
    "addmm and an activation": (lambda p, x: torch._addmm_activation(p.b, x[0], p.w), "_addmm_activation", HIDDEN),
    "attention without gradients": (
        lambda p, x: torch._native_multi_head_attention(
            x, x, x, 8, 2, p.experts.view(32, 8)[:24], p.b.repeat(3), p.w, p.b
        )[0],
        "_native_multi_head_attention",
        HIDDEN,
    ),
    "out=": (
        lambda p, x: torch.mm(x[0], p.w, out=torch.empty(8, 8)),
        "mm",
        "called with other arguments than input, mat2",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    function, form, reason = REFUSED[name]
    model, x = Model(function).requires_grad_(False), torch.randn(4, 8, 8)
    gm = fx.symbolic_trace(model)
    row = only_refusal(new := convert(gm), gm)
    assert (row.form, row.reason) in ((form, reason), (form, UNKNOWN))
    assert torch.equal(new(x), model(x))
    assert only_refusal(convert(gm, (x,)), gm).reason == reason


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_cast_to_float32_is_meant(dtype: torch.dtype) -> None:
    model, capture = Model(lambda p, x: F.linear(x.type(torch.float32), p.w.type(torch.float32))).to(dtype), Capture()
    x = torch.randn(4, 8, dtype=dtype)
    expected = F.linear(x.float(), model.w.float())
    for out in (convert(model, (x,))(x), torch.compile(model, backend=capture)(x)):
        assert out.dtype == torch.float32
        assert torch.equal(out, expected)
    assert [row.reason for row in capture.only.report.rows] == [COMPUTED]


@pytest.mark.parametrize(
    "name", [name for name in REFUSED if name != "out="]
)  # which Dynamo itself leaves out of a graph
def test_refused_through_dynamo(name: str) -> None:
    function, _, reason = REFUSED[name]
    model, capture, x = (
        Model(function).requires_grad_(name != "attention without gradients"),
        Capture(),
        torch.randn(4, 8, 8),
    )
    out = torch.compile(model, backend=capture)(x)
    (row,) = capture.only.report.rows
    assert row.reason == reason
    assert str(capture.only.after.graph) == str(capture.only.before.graph)
    assert torch.equal(out, model(x))


@pytest.mark.parametrize("form", ["lstm", "gru", "rnn_tanh", "rnn_relu"])
def test_a_recurrent_module_says_that_it_hides_its_linears(form: str) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            kind, _, nonlinearity = form.partition("_")
            self.rnn = getattr(nn, kind.upper())(8, 8, 2, **({"nonlinearity": nonlinearity} if nonlinearity else {}))

        def forward(self, x: Tensor) -> Any:
            return self.rnn(x)[0]

    model, x = Recurrent(), torch.randn(4, 3, 8)
    for new in (convert(gm := torch.export.export(model, (x,)).module()), convert(gm.requires_grad_(False))):
        row = only_refusal(new, gm)
        assert (row.form, row.reason) == (form, HIDDEN)
        assert torch.equal(new(x), model(x))
    capture = Capture()
    with torch._dynamo.config.patch(allow_rnn=True):  # else Dynamo calls it outside any graph
        out = torch.compile(model, backend=capture)(x)
    assert [(row.form, row.reason) for row in capture.only.report.rows] == [(form, HIDDEN)]
    assert torch.equal(out, model(x))


def test_a_dot_product_is_no_matmul() -> None:
    for function in (
        lambda p, x: torch.inner(x[0, 0], p.b),
        lambda p, x: p.b.inner(x[0, 0]),
        lambda p, x: torch.inner(x, x.sum()),
    ):
        assert convert(Model(function), (torch.randn(4, 8, 8),)).meta["fp8fx_report"].rows == ()


def test_the_name_of_a_weight_that_is_refused() -> None:
    for function in (lambda p, x: p.w @ x, lambda p, x: x @ p.w.view(1, 8, 8)):
        (row,) = convert(Model(function)).meta["fp8fx_report"].rows
        assert row.name == "w"


def test_sizes_of_what_is_refused() -> None:
    (row,) = (
        convert(Model(lambda p, x: x @ x[..., :5].transpose(-2, -1).mT), (torch.randn(4, 3, 3),))
        .meta["fp8fx_report"]
        .rows
    )
    assert (row.m, row.k, row.n, row.flops) == ("12", "3", "3", 2 * 12 * 3 * 3)
    (row,) = convert(Model(lambda p, x: x @ x)).meta["fp8fx_report"].rows
    assert (row.m, row.k, row.n, row.flops) == ("?", "?", "?", None)


@pytest.mark.parametrize("scalar", ["alpha", "beta"])
def test_a_scalar_computed_in_the_graph(scalar: str) -> None:
    model, x = Model(lambda p, x: torch.addmm(p.b, x, p.w, **{scalar: x.size(0)})), torch.randn(4, 8)
    gm = fx.symbolic_trace(model)
    row = only_refusal(new := convert(gm), gm)
    assert row.reason == "alpha or beta is computed in the graph"
    assert row.name == "w"
    assert torch.equal(new(x), model(x))


def test_a_weight_of_symbolic_shape() -> None:
    x, w = torch.randn(4, 8), nn.Parameter(torch.randn(6, 8))
    gm = make_fx(lambda x, w: x @ w.t(), tracing_mode="symbolic")(x, w)
    row = only_refusal(convert(gm, (x, w)), gm)
    assert row.reason.startswith("the weight's shape (")
    assert row.reason.endswith(") is symbolic")


def test_what_is_no_matmul_is_not_seen() -> None:
    model = nn.Sequential(nn.Conv1d(8, 8, 3), nn.ReLU(), nn.LayerNorm(6), nn.Dropout(0.5))
    gm = fx.symbolic_trace(model)
    assert convert(gm, (torch.randn(2, 8, 8),)).meta["fp8fx_report"].rows == ()


def test_match_node_itself() -> None:
    gm = fx.symbolic_trace(Model(lambda p, x: torch.addmm(p.b, x, p.w, alpha=2, beta=3) @ x.t()))
    propagate(gm, (torch.randn(5, 8),))
    kinds = NodeKinds(constants=constants(gm, None))
    found = {node.name: match_node(node, gm, kinds) for node in gm.graph.nodes}
    match, refusal = found.pop("addmm"), found.pop("matmul")
    assert isinstance(match, MatmulMatch)
    assert match.form is FORMS["addmm"]
    assert (match.spelling, match.path, match.name, match.alpha, match.beta, match.transposed) == (
        "addmm",
        "",
        "w",
        2,
        3,
        False,
    )
    assert (match.m, match.k, match.n) == (5, 8, 8)
    assert (match.input.name, match.weight.name, match.bias.name) == ("x", "w", "b")  # type: ignore[union-attr]
    assert isinstance(refusal, Refusal)
    assert (str(refusal.reason), refusal.m, refusal.k, refusal.n) == (ACTIVATIONS, 5, 8, 5)
    assert set(found.values()) == {None}


def test_a_product_with_a_vector_counts() -> None:
    row = only_refusal(convert(gm := fx.symbolic_trace(Model(lambda p, x: x @ p.b)), (torch.randn(4, 8),)), gm)
    assert (row.reason, row.m, row.k, row.n, row.flops) == ("the weight is 1-D, not 2-D", "4", "8", "1", 2 * 4 * 8)


def test_integers_cast_to_floats_are_no_weight() -> None:
    class Quantized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("w", torch.randint(-127, 127, (32, 64), dtype=torch.int8))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.w.to(x.dtype))

    x = torch.randn(4, 64).bfloat16()
    rows = fp8fx.convert(torch.export.export(Quantized(), (x,))).meta["fp8fx_report"].rows
    assert [row.reason for row in rows] == [COMPUTED]
