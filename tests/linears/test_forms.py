"""However a linear is written, the rewritten graph is the one written by hand, and so is every bit of its output."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from fp8fx.config import Config
from fp8fx.convert import convert
from fp8fx.recipes.recipe import RECIPES
from tests.support.capture import Capture, assert_same_graph, ops
from tests.support.forms import FORMS, Form, K, N, Weights, aten, by_hand, example, fp8, graph_of, t, traced


def each(forms: Iterable[Form]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("form", list(forms), ids=lambda form: form.name)


# No tracer sees `t(constant)` in what is expected, and which expert it is has no value without Dynamo.
@each(form for form in FORMS if "constant" not in form.name and "number" not in form.name)
@pytest.mark.parametrize("recipe", RECIPES)
def test_symbolic_trace(form: Form, recipe: str) -> None:
    gm, expected = traced(Weights(form.written)), by_hand(form, recipe)
    for dims in form.dims:
        x = example(dims)
        new = convert(gm, (x,), recipe=recipe)
        assert_same_graph(new.graph, traced(expected).graph)
        assert torch.equal(new(x), expected(x)), f"{dims}-D input"
        assert new(x).stride() == gm(x).stride()
    if not form.shaped:  # example inputs change nothing
        assert_same_graph(convert(gm, recipe=recipe).graph, new.graph)


def test_symbolic_trace_of_a_constant() -> None:
    model = Weights(lambda p, x: F.linear(x, p.constant))
    new = convert(fx.symbolic_trace(model))
    assert_same_graph(new.graph, graph_of(lambda x, constant: fp8("mixed")(x, t(constant)), ("x", "constant")))
    x = example(3)
    assert torch.equal(new(x), fp8("mixed")(x, model.constant.t()))


def test_an_einsum_lies_in_memory_as_torch_s_own() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(5, 2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bsk,nk->nbs", x, self.w).view(-1, 64)  # its columns come first

    model, x = Model(), torch.randn(3, 64, 2)
    new = convert(model, (x,))
    assert new.meta["fp8fx_report"].rewritten
    assert torch.equal(new(x), torch.ops.fp8fx.matmul_fp8_mixed(x, model.w.t()).permute(2, 0, 1).reshape(-1, 64))


def check_dynamo(model: nn.Module, expected: nn.Module, x: Tensor, recipe: str) -> None:
    capture, plain = Capture(Config(recipe=recipe)), Capture()
    out = torch.compile(model, backend=capture)(x)
    torch.compile(expected, backend=plain)(x)
    assert_same_graph(capture.only.after.graph, plain.only.before.graph)
    torch.testing.assert_close(out, expected(x), rtol=0, atol=0)


@each(FORMS)
def test_dynamo(form: Form) -> None:
    check_dynamo(Weights(form.written), by_hand(form, "mixed"), example(form.dims[-1]), "mixed")


@pytest.mark.slow
def test_dynamo_all_forms_in_one_graph() -> None:
    forms = [form for form in FORMS if 2 in form.dims]
    model = Weights(lambda p, x: [form.written(p, x) for form in forms])
    expected = Weights(lambda p, x: [form.expected(p, x, fp8("global")) for form in forms])
    check_dynamo(model, expected, example(2), "global")


EXPORTED = (
    "nn.Linear",
    "F.linear without bias",
    "F.linear sliced",
    "addmm",
    "addmm 2-D addend, alpha, beta",
    "mm",
    "@ .T",
    "F.linear constant",
)


@each(form for form in FORMS if form.name in EXPORTED)
def test_export(form: Form) -> None:
    model, expected = Weights(form.written), by_hand(form, "mixed")
    x = example(form.dims[-1])
    new = convert(torch.export.export(model, (x,)))
    assert_same_graph(new.graph, torch.export.export(expected, (x,)).module().graph)
    assert torch.equal(new(x), expected(x))


@pytest.mark.parametrize(
    "call",
    [
        lambda w, x: torch.mv(w, x),
        lambda w, x: w @ x,
        lambda w, x: x @ w.t(),
        lambda w, x: torch.einsum("bhk,nhk->bn", x[None, None], w[:, None]),
    ],
    ids=["mv", "@", "@ t", "einsum of one head"],
)
def test_autocast_gives_each_form_the_dtype_that_torch_gives_it(call: Callable[[Tensor, Tensor], Tensor]) -> None:
    class Vector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(N, K))

        def forward(self, x: Tensor) -> Tensor:
            return call(self.weight, x)

    model, x = Vector(), torch.randn(K)
    new = convert(model, (x,))
    assert len(new.meta["fp8fx_report"].rewritten) == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert new(x).dtype == model(x).dtype


@pytest.mark.slow
@pytest.mark.parametrize("tracer", ["torch.export", "make_fx"])
def test_all_forms_in_one_aten_graph(tracer: str) -> None:
    forms = [
        form for form in FORMS if form.name != "F.linear data" and 2 in form.dims
    ]  # export itself does not take `.data`
    model, x = Weights(lambda p, x: [form.written(p, x) for form in forms]), example(2)
    new = convert(make_fx(model)(x) if tracer == "make_fx" else torch.export.export(model, (x,)))
    counts = ops(new.graph)
    assert counts[torch.ops.fp8fx.matmul_fp8_mixed.default] == len(forms)
    assert not counts.keys() & {aten.linear.default, aten.matmul.default, aten.mm.default, aten.addmm.default}
    torch.testing.assert_close(list(new(x)), [form.expected(model, x, fp8("mixed")) for form in forms], rtol=0, atol=0)
