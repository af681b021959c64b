"""What is no linear, or none that can be rewritten, is left as it is, and the report says why."""

from __future__ import annotations

import copy
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
from fp8fx.linears.match import match_node
from fp8fx.linears.matches import MatmulMatch, Refusal
from fp8fx.linears.site import NodeKinds
from fp8fx.reasons import CallReason
from tests.support.capture import Capture

ACTIVATIONS = "activation times activation"
COMPUTED = "the weight is computed, not a parameter, a buffer, a constant or a view of one"
LEFT = "the weight is on the left of a linear or a sum"
UNKNOWN = "the input's shape is not known; pass example inputs"
OWN = "both operands are the model's own, and neither is an activation of the call"
HOOKS = "the module has hooks"
HIDDEN = "a fused call that hides its linears"
CHAIN = "a chain of matmuls, whose order torch chooses"
IN_PLACE = "the result is added to a tensor in place"
BILINEAR = "each product is of two inputs and a weight"

aten = torch.ops.aten


class Scaled(nn.Linear):
    """A linear that does something else as well."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Model(nn.Module):
    """Square weights, so that any of them can stand anywhere, and a function of them as its forward."""

    def __init__(self, function: Callable[[Model, Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.fc = nn.Linear(8, 8)
        self.scaled = Scaled(8, 8)
        self.w = nn.Parameter(torch.randn(8, 8))
        self.b = nn.Parameter(torch.randn(8))
        self.experts = nn.Parameter(torch.randn(4, 8, 8))
        self.register_buffer("index", torch.tensor([7, 6, 5, 4, 3, 2, 1, 0]))
        self.register_buffer("number", torch.tensor(3))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


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
    "experts, gathered": (lambda p, x: torch.bmm(x, p.experts[p.index % 4][:4]), "bmm", "the weight is gathered by an index"),
    "cast to float32": (lambda p, x: F.linear(x.float(), p.w.float()), "F.linear", COMPUTED),
    "einsum of activations": (lambda p, x: torch.einsum("bij,bkj->bik", x, x), "einsum", ACTIVATIONS),
    "einsum, a batched weight": (lambda p, x: torch.einsum("bij,bjk->bik", x, p.experts), "einsum", "the weight is batched"),
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
    "baddbmm with 3-D weight": (lambda p, x: torch.baddbmm(p.b, x, p.experts.mT), "baddbmm", "the weight is 3-D, not 2-D"),
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
    "lstm_cell": (lambda p, x: torch.lstm_cell(x[0], (x[1], x[2]), p.experts.view(32, 8), p.experts.view(32, 8))[0], "lstm_cell", HIDDEN),
    "gru_cell": (lambda p, x: torch.gru_cell(x[0], x[1], p.experts.view(32, 8)[:24], p.experts.view(32, 8)[8:]), "gru_cell", HIDDEN),
    "rnn_tanh_cell": (lambda p, x: torch.rnn_tanh_cell(x[0], x[1], p.w, p.fc.weight, p.b, p.b), "rnn_tanh_cell", HIDDEN),
    "rnn_relu_cell": (lambda p, x: torch.rnn_relu_cell(x[0], x[1], p.w, p.fc.weight), "rnn_relu_cell", HIDDEN),
    "addmm and an activation": (lambda p, x: torch._addmm_activation(p.b, x[0], p.w), "_addmm_activation", HIDDEN),
    "attention without gradients": (
        lambda p, x: torch._native_multi_head_attention(x, x, x, 8, 2, p.experts.view(32, 8)[:24], p.b.repeat(3), p.w, p.b)[0],
        "_native_multi_head_attention",
        HIDDEN,
    ),
    "out=": (lambda p, x: torch.mm(x[0], p.w, out=torch.empty(8, 8)), "mm", "called with other arguments than input, mat2"),
}


def only_refusal(new: fx.GraphModule, old: fx.GraphModule) -> Any:
    """The one row of the report, of a graph that has not changed."""
    assert new.code == old.code
    assert [n.format_node() for n in new.graph.nodes] == [n.format_node() for n in old.graph.nodes]
    (row,) = new.meta["fp8fx_report"].rows
    assert (row.op, row.executor, row.bsz, row.bsz2) == (None, None, None, None)
    return row


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


@pytest.mark.parametrize("name", [name for name in REFUSED if name != "out="])  # which Dynamo itself leaves out of a graph
def test_refused_through_dynamo(name: str) -> None:
    function, _, reason = REFUSED[name]
    model, capture, x = Model(function).requires_grad_(name != "attention without gradients"), Capture(), torch.randn(4, 8, 8)
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
    for function in (lambda p, x: torch.inner(x[0, 0], p.b), lambda p, x: p.b.inner(x[0, 0]), lambda p, x: torch.inner(x, x.sum())):
        assert convert(Model(function), (torch.randn(4, 8, 8),)).meta["fp8fx_report"].rows == ()


def test_the_name_of_a_weight_that_is_refused() -> None:
    for function in (lambda p, x: p.w @ x, lambda p, x: x @ p.w.view(1, 8, 8)):
        (row,) = convert(Model(function)).meta["fp8fx_report"].rows
        assert row.name == "w"


def test_sizes_of_what_is_refused() -> None:
    (row,) = convert(Model(lambda p, x: x @ x[..., :5].transpose(-2, -1).mT), (torch.randn(4, 3, 3),)).meta["fp8fx_report"].rows
    assert (row.m, row.k, row.n, row.flops) == ("12", "3", "3", 2 * 12 * 3 * 3)
    (row,) = convert(Model(lambda p, x: x @ x)).meta["fp8fx_report"].rows
    assert (row.m, row.k, row.n, row.flops) == ("?", "?", "?", None)


@pytest.mark.parametrize(
    "hook",
    [
        lambda m: m.register_forward_hook(lambda *_: None),
        lambda m: m.register_forward_pre_hook(lambda *_: None),
        lambda m: m.register_full_backward_hook(lambda *_: None),
        lambda m: m.register_full_backward_pre_hook(lambda *_: None),
    ],
    ids=["forward", "forward_pre", "backward", "backward_pre"],
)
def test_a_module_with_hooks(hook: Callable[[nn.Module], Any]) -> None:
    model = Model(lambda p, x: p.fc(x))
    handle = hook(model.fc)
    gm = fx.symbolic_trace(model)
    row = only_refusal(convert(gm), gm)
    assert (row.reason, row.path, row.form) == (HOOKS, "fc", "Linear")
    handle.remove()
    assert convert(gm).meta["fp8fx_report"].rewritten


def calling(module: nn.Module, *args: Any) -> fx.GraphModule:
    """A graph that calls `module` as a whole, whatever symbolic_trace would look into."""
    root = nn.Module()
    root.fc = module
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_module("fc", args or (x,)))
    return fx.GraphModule(root, graph)


def test_a_subclass_with_a_forward_of_its_own() -> None:
    gm, x = calling(module := Scaled(8, 8)), torch.randn(4, 8)
    row = only_refusal(new := convert(gm), gm)
    assert (row.form, row.reason) == ("Scaled", "Scaled has a forward of its own")
    assert torch.equal(new(x), module(x))


def test_a_forward_put_on_the_instance() -> None:
    model, x = Model(lambda p, x: p.fc(x)), torch.randn(4, 8)
    plain = model.fc.forward
    model.fc.forward = lambda x: 2 * plain(x)  # type: ignore[method-assign]
    gm = fx.symbolic_trace(model)
    assert only_refusal(new := convert(gm), gm).reason == "Linear has a forward of its own"
    assert torch.equal(new(x), model(x))


def test_a_parametrized_weight() -> None:
    model, x = Model(lambda p, x: p.fc(x)), torch.randn(4, 8)
    nn.utils.parametrizations.orthogonal(model.fc)
    gm = fx.symbolic_trace(model)
    new = convert(gm)
    assert only_refusal(new, gm).reason == COMPUTED
    assert torch.equal(new(x), model(x))
    assert model.state_dict().keys() >= new.state_dict().keys() == gm.state_dict().keys()


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm], ids=["hook", "parametrization"])
def test_a_normalized_weight(norm: Callable[[nn.Module], nn.Module], trained: bool) -> None:
    """Its linear is left alone, and stays exact; the next one is not."""
    norm(first := nn.Linear(8, 8))
    model, x = nn.Sequential(first, nn.Linear(8, 6)), torch.randn(4, 8, requires_grad=trained)
    inputs = [x, *model.parameters()]

    class ByHand(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.fp8fx.matmul_fp8_mixed(model[0](x), model[1].weight.t(), bias=model[1].bias)

    by_hand, capture = ByHand(), Capture()
    with torch.set_grad_enabled(trained):
        for call, report in (
            (new := convert(model), new.meta["fp8fx_report"]),
            (new := convert(torch.export.export(model, (x,))), new.meta["fp8fx_report"]),
            (torch.compile(model, backend=capture), None),
        ):
            out, expected = call(x), by_hand(x)
            assert torch.equal(out, expected)
            assert [row.reason for row in (report or capture.only.report).rows] == [COMPUTED, None]
            if trained:
                for a, b in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (out, expected)), strict=True):
                    torch.testing.assert_close(a, b)


def test_a_subclass_with_linears_own_forward_is_a_linear() -> None:
    class Named(nn.Linear):
        pass

    (row,) = convert(calling(Named(8, 8))).meta["fp8fx_report"].rows
    assert (row.form, row.reason) == ("Named", None)


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


@pytest.mark.parametrize(
    ("target", "args", "kwargs", "reason"),
    [
        (torch.matmul, ("x", 3.0), {}, "an operand is not computed in the graph"),
        (F.linear, ("x",), {}, "an operand is not computed in the graph"),
        (torch.addmm, (1.0, "x", "w"), {}, "the addend is not computed in the graph"),
        (torch.matmul, ("x", "w", None), {}, "called with other arguments than input, mat2"),
        (F.linear, ("x", "w"), {"scale": 2}, "called with other arguments than input, weight, bias"),
        (
            aten.addmm.default,
            ("x", "x", "w"),
            {"out_dtype": torch.float32},
            "called with other arguments than input, mat1, mat2, beta, alpha",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),  # an address would be another one in each process
)
def test_a_call_written_by_hand(target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], reason: str) -> None:
    graph = fx.Graph()
    nodes = {"x": graph.placeholder("x"), "w": graph.get_attr("w")}
    graph.output(graph.call_function(target, tuple(nodes.get(a, a) for a in args), kwargs))
    gm = fx.GraphModule(Model(lambda p, x: x), graph)
    assert only_refusal(convert(gm), gm).reason == reason


def test_a_module_called_with_a_literal() -> None:
    gm = calling(nn.Linear(8, 8), 1.0)
    (node,) = gm.graph.find_nodes(op="call_module", target="fc")
    found = match_node(node, gm, NodeKinds(constants=frozenset()))
    assert isinstance(found, Refusal)
    assert found.reason == CallReason.INPUT_NOT_IN_GRAPH()


def test_what_is_no_matmul_is_not_seen() -> None:
    model = nn.Sequential(nn.Conv1d(8, 8, 3), nn.ReLU(), nn.LayerNorm(6), nn.Dropout(0.5))
    gm = fx.symbolic_trace(model)
    assert convert(gm, (torch.randn(2, 8, 8),)).meta["fp8fx_report"].rows == ()


OWN_PRODUCTS: dict[str, Callable[[Model], Tensor]] = {
    "a weight times a weight": lambda p: p.fc.weight @ p.w,
    "a low rank added to a weight": lambda p: p.w + torch.matmul(p.w[:, :2], p.w[:2]),
    "times what is computed of weights": lambda p: torch.mm(p.w.t(), p.w.softmax(-1) * 2),
    "times a constant made here": lambda p: torch.mv(p.w, torch.ones(8)),
    "einsum": lambda p: torch.einsum("ij,kj->ik", p.w, p.fc.weight),
    "einsum of computed ones": lambda p: torch.einsum("ij,kj->ik", 2 * p.w, 2 * p.w),
    "written with what is computed of weights": lambda p: p.w @ torch.zeros(8, 8).copy_(p.fc.weight.detach()),
}
NOT_OWN: dict[str, Callable[[Model, Tensor], Any]] = {
    "a linear, which names its weight": lambda p, x: x + F.linear(p.fc.weight, p.w),
    "addmm, which names its weight": lambda p, x: x + torch.addmm(p.b, p.fc.weight, p.w),
    "noise": lambda p, x: x + torch.randn(8, 8) @ p.w,
    "memory that an input is written to": lambda p, x: torch.zeros(8, 8).copy_(x) @ p.w,
    "a view of it": lambda p, x: ((y := torch.zeros(8, 8)), (z := y.t()), y.copy_(x), z @ p.w)[-1],
    "a buffer that an input is written to": lambda p, x: (p.cache @ p.w, p.cache.copy_(x))[0],
    "a buffer that gets what is computed of another": lambda p, x: (p.cache.copy_(x), p.state.copy_(2 * p.cache), p.state @ p.w)[-1],
}


def with_state(function: Callable[[Model, Tensor], Any]) -> Model:
    model = Model(function)
    model.register_buffer("cache", torch.randn(8, 8))
    model.register_buffer("state", torch.randn(8, 8))
    return model


@pytest.mark.parametrize("name", OWN_PRODUCTS)
def test_a_product_of_weights_alone_is_no_linear(name: str) -> None:
    model, x = Model(lambda p, x: x + OWN_PRODUCTS[name](p)), torch.randn(8, 8)
    capture = Capture()
    out = torch.compile(model, backend=capture)(x)
    assert [row.reason for row in capture.only.report.rows] == [OWN]
    assert torch.equal(out, model(x))


@pytest.mark.parametrize("name", NOT_OWN)
def test_a_product_that_an_input_reaches_or_that_names_its_weight_is_a_linear(name: str) -> None:
    capture = Capture()
    torch.compile(with_state(NOT_OWN[name]), backend=capture, fullgraph=True)(torch.randn(8, 8))
    assert [row.reason for row in capture.only.report.rows] == [None]


class Normed(nn.Module):
    """Two calls of a linear whose weight is divided by its largest singular value, and a linear behind."""

    def __init__(self, norm: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.first = norm(nn.Linear(32, 32), n_power_iterations=2)
        self.second = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(self.first(x).tanh()))
        return out


NORMS = {"hook": nn.utils.spectral_norm, "parametrization": nn.utils.parametrizations.spectral_norm}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["dynamo", "export", "symbolic_trace"])
@pytest.mark.parametrize("norm", NORMS)
def test_the_norm_of_a_weight_stays_exact(norm: str, kind: str, training: bool) -> None:
    model, x = Normed(NORMS[norm]).train(training), torch.randn(4, 32)
    expected, capture = copy.deepcopy(model), Capture()
    if kind == "dynamo":
        call: Any = torch.compile(model, backend=capture)
    elif kind == "export":
        call = convert(torch.export.export(model, (x,)))
    else:
        call = convert(fx.symbolic_trace(model), (x,))
    for _ in range(2):  # the next iteration starts from the buffers that this one has left
        out, h = call(x), expected.first(expected.first(x).tanh())
        weight, bias = expected.second.weight.t(), expected.second.bias
        torch.testing.assert_close(out, torch.ops.fp8fx.matmul_fp8_mixed(h, weight, bias=bias), rtol=1e-5, atol=1e-5)
    report = capture.only.report if kind == "dynamo" else call.meta["fp8fx_report"]
    assert len(report.rewritten) == 1
    assert {row.reason for row in report.rows} == {None, COMPUTED} | ({OWN} if kind != "symbolic_trace" else set())
    state = call.state_dict() if kind == "export" else model.state_dict()
    for name, buffer in expected.named_buffers():
        torch.testing.assert_close(state[name], buffer)


def test_match_node_itself() -> None:
    gm = fx.symbolic_trace(Model(lambda p, x: torch.addmm(p.b, x, p.w, alpha=2, beta=3) @ x.t()))
    propagate(gm, (torch.randn(5, 8),))
    kinds = NodeKinds(constants=constants(gm, None))
    found = {node.name: match_node(node, gm, kinds) for node in gm.graph.nodes}
    match, refusal = found.pop("addmm"), found.pop("matmul")
    assert isinstance(match, MatmulMatch)
    assert match.form is FORMS["addmm"]
    assert (match.spelling, match.path, match.name, match.alpha, match.beta, match.transposed) == ("addmm", "", "w", 2, 3, False)
    assert (match.m, match.k, match.n) == (5, 8, 8)
    assert (match.input.name, match.weight.name, match.bias.name) == ("x", "w", "b")  # type: ignore[union-attr]
    assert isinstance(refusal, Refusal)
    assert (str(refusal.reason), refusal.m, refusal.k, refusal.n) == (ACTIVATIONS, 5, 8, 5)
    assert set(found.values()) == {None}


def test_a_weight_that_the_call_is_given() -> None:
    class Given(nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            return F.linear(x, w)

    x, w = torch.randn(4, 8), torch.randn(6, 8)
    (row,) = fp8fx.explain(Given(), x, w).rows
    assert row.reason == "the weight is an input of the graph, and no parameter"
    assert fp8fx.explain(Given(), x, nn.Parameter(w)).rewritten


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


@pytest.mark.parametrize("freeze", [False, True])
def test_an_argument_that_an_inner_function_reads_is_no_weight(freeze: bool) -> None:
    """It is in a cell, as what a function takes from around itself."""

    def call(x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([(x @ y) * i for i in range(2)]) + (lambda: x @ y)()

    backend = fp8fx.Backend(fp8fx.Config(freeze=freeze))
    with torch.no_grad():
        compiled = torch.compile(call, backend=backend)
        for _ in range(3):
            x, y = torch.randn(8, 64), torch.randn(64, 64)
            torch.testing.assert_close(compiled(x, y), call(x, y))
    (report,) = backend.reports  # compiled once
    assert {row.reason for row in report.rows} == {ACTIVATIONS}


@pytest.mark.parametrize("freeze", [False, True])
def test_an_argument_at_a_static_address_is_no_weight(freeze: bool) -> None:
    """As caches of keys and values are marked, which are written elsewhere."""

    def call(x: Tensor, cache: list[Tensor]) -> Tensor:
        return x @ cache[0]

    cache, backend = [torch.randn(64, 64)], fp8fx.Backend(fp8fx.Config(freeze=freeze))
    torch._dynamo.mark_static_address(cache[0])
    with torch.no_grad():
        compiled = torch.compile(call, backend=backend)
        for _ in range(2):
            x = torch.randn(8, 64)
            torch.testing.assert_close(compiled(x, cache), call(x, cache))
            cache[0].normal_()
    (report,) = backend.reports
    assert [row.reason for row in report.rows] == [ACTIVATIONS]


@pytest.mark.parametrize("freeze", [False, True])
def test_what_a_module_holds_otherwise_than_as_a_parameter_is_a_weight(freeze: bool) -> None:
    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("buffer", torch.randn(64, 64))
            self.plain, self.several = torch.randn(64, 64), [torch.randn(64, 64)]

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return x @ self.buffer, x @ self.plain, x @ self.several[0]

    backend = fp8fx.Backend(fp8fx.Config(freeze=freeze))
    with torch.no_grad():
        torch.compile(Holds(), backend=backend)(torch.randn(8, 64))
    assert [(row.name, row.reason) for row in backend.reports[0].rows] == [("buffer", None), ("plain", None), ("several.0", None)]


@pytest.mark.parametrize("freeze", [False, True])
def test_what_a_function_takes_from_around_itself_is_a_weight(freeze: bool) -> None:
    w, backend = torch.randn(64, 64), fp8fx.Backend(fp8fx.Config(freeze=freeze))

    def call(x: Tensor) -> Tensor:
        return x @ w

    with torch.no_grad():
        torch.compile(call, backend=backend)(torch.randn(8, 64))
    assert [row.reason for row in backend.reports[0].rows] == [None]
