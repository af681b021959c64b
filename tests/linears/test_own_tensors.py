"""Which tensors are the model's own: products of weights alone, what a call is given, and what a function takes from
around itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fp8fx
from fp8fx.convert import convert
from tests.support.capture import Capture
from tests.support.refusals import ACTIVATIONS, COMPUTED, Model

OWN = "both operands are the model's own, and neither is an activation of the call"

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
    "a buffer that gets what is computed of another": lambda p, x: (
        p.cache.copy_(x),
        p.state.copy_(2 * p.cache),
        p.state @ p.w,
    )[-1],
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


def test_a_weight_that_the_call_is_given() -> None:
    class Given(nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            return F.linear(x, w)

    x, w = torch.randn(4, 8), torch.randn(6, 8)
    (row,) = fp8fx.explain(Given(), x, w).rows
    assert row.reason == "the weight is an input of the graph, and no parameter"
    assert fp8fx.explain(Given(), x, nn.Parameter(w)).rewritten


@pytest.mark.compiles
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


@pytest.mark.compiles
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


@pytest.mark.compiles
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
    assert [(row.name, row.reason) for row in backend.reports[0].rows] == [
        ("buffer", None),
        ("plain", None),
        ("several.0", None),
    ]


@pytest.mark.compiles
@pytest.mark.parametrize("freeze", [False, True])
def test_what_a_function_takes_from_around_itself_is_a_weight(freeze: bool) -> None:
    w, backend = torch.randn(64, 64), fp8fx.Backend(fp8fx.Config(freeze=freeze))

    def call(x: Tensor) -> Tensor:
        return x @ w

    with torch.no_grad():
        torch.compile(call, backend=backend)(torch.randn(8, 64))
    assert [row.reason for row in backend.reports[0].rows] == [None]
