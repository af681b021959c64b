"""Linears inside the bodies of higher-order operators: activation checkpointing, cond, loops, scans and regions
compiled once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._higher_order_ops import map as map_rows
from torch._higher_order_ops.scan import scan
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import fp8fx
from fp8fx.convert import rewritten
from fp8fx.ops.matmul import op
from fp8fx.reasons import PlaceReason
from fp8fx.recipes.quantize import sqnr
from tests.support.capture import Capture


class Checkpointed(nn.Module):
    """A parameter's linear and a buffer's, recomputed in backward or not (None)."""

    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.up = nn.Linear(64, 128)
        self.register_buffer("down", torch.randn(128, 64) / 8)

    def body(self, x: Tensor) -> Tensor:
        return (self.up(x).relu() @ self.down).tanh()

    def forward(self, x: Tensor) -> Tensor:
        return (
            self.body(x) if self.use_reentrant is None else checkpoint(self.body, x, use_reentrant=self.use_reentrant)
        )


def trained(use_reentrant: bool | None, state: dict[str, Tensor], **options: Any) -> tuple[list[Tensor], fp8fx.Report]:
    torch._dynamo.reset()
    model, backend = Checkpointed(use_reentrant), fp8fx.Backend(fp8fx.Config(**options))
    model.load_state_dict(state)
    x = torch.linspace(-1, 1, 8 * 64).view(8, 64).requires_grad_()
    out = torch.compile(model, backend=backend, fullgraph=True)(x)
    return [out, *torch.autograd.grad(out.square().sum(), (x, *model.parameters()))], backend.reports[0]


@pytest.mark.compiles
@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["mixed", "global", "rowwise"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_no_bit(recipe: str, use_reentrant: bool) -> None:
    state = Checkpointed(None).state_dict()
    plain, report = trained(None, state, recipe=recipe)
    recomputed, inside = trained(use_reentrant, state, recipe=recipe)
    assert [(row.path, row.name) for row in inside.rewritten] == [("up", "up.weight"), ("", "down")]
    assert inside.rows == report.rows
    assert inside.graphs == 1
    for a, b in zip(plain, recomputed, strict=True):
        assert torch.equal(a, b)


@pytest.mark.compiles
def test_filters_and_refusals_reach_into_a_body() -> None:
    _, report = trained(False, Checkpointed(None).state_dict(), exclude=("up",))
    assert [(row.name, row.reason) for row in report.rows] == [("up.weight", "excluded by 'up'"), ("down", None)]


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.yes, self.no = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: self.yes(x), lambda x: self.no(x), (x,))


def test_both_branches_of_a_cond() -> None:
    model, capture = Branching(), Capture(fp8fx.Config())
    compiled = torch.compile(model, backend=capture)
    with torch.no_grad():
        for x, branch in ((torch.rand(4, 64), model.yes), (-torch.rand(4, 64), model.no)):
            assert torch.equal(compiled(x), fp8fx.convert(branch)(x))


class Looping(nn.Module):
    """A linear inside a body, by its kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.fc, self.other = kind, nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Any:
        if self.kind == "while_loop":
            more, step = lambda i, x: i < 3, lambda i, x: (i + 1, torch.tanh(self.fc(x)))
            return torch._higher_order_ops.while_loop(more, step, (torch.tensor(0), x))[1]
        if self.kind == "scan":
            return scan(lambda c, y: (torch.tanh(self.fc(c) + y), c + y), x[0], x)[1]
        if self.kind == "map":
            return map_rows(lambda y: self.fc(y), x)

        @torch.compiler.nested_compile_region  # type: ignore[untyped-decorator]
        def region(layer: nn.Module, x: Tensor) -> Tensor:
            return torch.relu(layer(x))

        return region(self.other, region(self.fc, x))


@pytest.mark.parametrize("kind", ["while_loop", "scan", "map", "a region compiled once"])
def test_bodies_that_run_several_times(kind: str) -> None:
    model, capture, x = Looping(kind), Capture(fp8fx.Config()), torch.randn(4, 8, 64)
    names = ["fc.weight", "other.weight"] if kind.startswith("a region") else ["fc.weight"]
    with torch.no_grad():
        out, exact = torch.compile(model, backend=capture)(x), model(x)
    assert [(row.name, row.reason) for row in capture.only.report.rows] == [(name, None) for name in names]
    assert 15 < sqnr(exact, out) < 60  # dB
    assert capture.only.report.graphs == 1


def gradients(model: nn.Module, out: Tensor, x: Tensor) -> list[Tensor]:
    """Of the input and the parameters that the output depends on."""
    found = torch.autograd.grad(out.square().sum(), (x, *model.parameters()), allow_unused=True)
    return [grad for grad in found if grad is not None]


@pytest.mark.compiles
def test_inductor_compiles_a_body_that_runs_several_times() -> None:
    model, x = Looping("a region compiled once"), torch.randn(4, 64, requires_grad=True)
    out = torch.compile(model, backend="fp8")(x)
    exact = model(x)
    assert 15 < sqnr(exact, out) < 60
    for found, wanted in zip(gradients(model, out, x), gradients(model, exact, x), strict=True):
        assert 10 < sqnr(wanted, found) < 60


@pytest.mark.compiles
def test_inductor_compiles_a_while_loop_without_gradients() -> None:
    model, backend, x = Looping("while_loop"), fp8fx.Backend(), torch.randn(4, 8, 64)
    with torch.no_grad():
        out, exact = torch.compile(model, backend=backend, fullgraph=True)(x), model(x)
    assert [(row.name, row.reason) for report in backend.reports for row in report.rows] == [("fc.weight", None)]
    assert 15 < sqnr(exact, out) < 60


@pytest.mark.compiles
@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["mixed", "global"])
def test_training_through_a_cond(recipe: str) -> None:
    model, backend = Branching(), fp8fx.Backend(fp8fx.Config(recipe=recipe))
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for sign, branch, other in ((1, model.yes, model.no), (-1, model.no, model.yes)):
        x = (sign * torch.rand(4, 64)).requires_grad_()
        out, expected = compiled(x), fp8fx.convert(branch, recipe=recipe)(x)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(out, branch(x), rtol=1e-5, atol=1e-5)  # FP8 it is
        wanted = torch.autograd.grad(expected.square().sum(), (x, *branch.parameters()))
        found = torch.autograd.grad(out.square().sum(), (x, *branch.parameters(), *other.parameters()))
        for a, b in zip(found[:3], wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert not any(grad.any() for grad in found[3:])
    assert [len(report.rewritten) for report in backend.reports] == [2]


def ahead_of_time(model: nn.Module, reports: list[fp8fx.Report]) -> Any:
    """Compiled down to ATen, backward included, and run by eager kernels: torch 2.13's Inductor compiles neither map
    nor scan on a CPU."""

    def backend(gm: Any, inputs: Any) -> Any:
        new, report = rewritten(gm, inputs, fp8fx.Config())
        reports.append(report)
        return aot_eager(new, inputs)

    return torch.compile(model, backend=backend, fullgraph=True)


def test_training_through_a_map() -> None:
    model, reports, x = Looping("map"), list[fp8fx.Report](), torch.randn(4, 8, 64, requires_grad=True)
    out, exact = ahead_of_time(model, reports)(x), model(x)
    assert [(row.name, row.reason) for row in reports[0].rows] == [("fc.weight", None)]
    assert 15 < sqnr(exact, out) < 60
    for found, wanted in zip(gradients(model, out, x), gradients(model, exact, x), strict=True):
        assert 10 < sqnr(wanted, found) < 60


@pytest.mark.slow
def test_a_scan_is_left_alone_where_it_needs_gradients() -> None:
    model, reports, x = Looping("scan"), list[fp8fx.Report](), torch.randn(4, 8, 64, requires_grad=True)
    out, exact = ahead_of_time(model, reports)(x), model(x)
    reason = "inside a scan that needs gradients: torch cannot store the FP8 tensors of each step"
    assert [(row.name, row.reason) for row in reports[0].rows] == [("fc.weight", reason)]
    torch.testing.assert_close(out, exact)
    for found, wanted in zip(gradients(model, out, x), gradients(model, exact, x), strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_while_loop_is_left_alone_where_it_needs_gradients() -> None:
    model, capture, x = Looping("while_loop"), Capture(fp8fx.Config()), torch.randn(4, 8, 64)
    out = torch.compile(model, backend=capture)(x)
    reason = "inside a while_loop that needs gradients: torch cannot store the FP8 tensors of each step"
    assert [(row.name, row.reason) for row in capture.only.report.rows] == [("fc.weight", reason)]
    assert torch.equal(out, model(x))
    capture = Capture(fp8fx.Config())
    torch.compile(model.requires_grad_(False), backend=capture)(x)
    assert [(row.name, row.reason) for row in capture.only.report.rows] == [("fc.weight", None)]


class Regions(nn.Module):
    """One region, called for three linears, and for a product of two activations."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(3))

        @torch.compiler.nested_compile_region  # type: ignore[untyped-decorator]
        def region(x: Tensor, y: Tensor) -> Tensor:
            return x @ y

        self.region = region

    def forward(self, x: Tensor) -> list[Tensor]:
        region, y = self.region, x[:, :64].sin()
        return [region(x, y), *(region(x, layer.weight) for layer in self.layers)]


@pytest.mark.compiles
@pytest.mark.parametrize("train", [False, True])
def test_each_call_of_a_region_is_rewritten_as_its_own_weight_wants_it(train: bool) -> None:
    torch._dynamo.reset()
    model, x, y = Regions(), torch.randn(64, 64), torch.randn(64, 64)
    backend = fp8fx.Backend(fp8fx.Config(exclude=("layers.1.weight",)))
    with torch.set_grad_enabled(train):
        out = torch.compile(model, backend=backend, fullgraph=True)(x)
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(out, model(x), strict=True)]
    assert [row.reason for row in backend.reports[0].rows] == [
        "activation times activation",
        None,
        "excluded by 'layers.1.weight'",
        None,
    ]
    assert [error > 1e-3 for error in errors] == [False, True, False, True]
    if train:
        grads = torch.autograd.grad(sum((one * y).sum() for one in out), list(model.parameters()))
        expected = torch.autograd.grad(sum((one * y).sum() for one in model(x)), list(model.parameters()))
        assert all(sqnr(b, a) > 25 for a, b in zip(grads, expected, strict=True))


def test_a_while_loop_in_a_region_without_gradients_is_rewritten() -> None:
    model, capture, x = Looping("while_loop"), Capture(fp8fx.Config()), torch.randn(4, 8, 64)

    def call(x: Tensor) -> Any:
        with torch.no_grad():
            return model(x)

    torch.compile(call, backend=capture)(x)
    assert [(row.name, row.reason) for row in capture.only.report.rows] == [("fc.weight", None)]


def test_a_body_inside_forward_mode_is_left_alone() -> None:
    fc, capture = nn.Linear(64, 32), Capture(fp8fx.Config())

    def call(x: Tensor) -> Any:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(
                checkpoint(lambda y: fc(y).relu(), forward_ad.make_dual(x, x), use_reentrant=False)
            ).tangent

    x = torch.randn(8, 64)
    assert torch.equal(torch.compile(call, backend=capture)(x), call(x))
    assert [row.kind for row in capture.only.report.rows] == [PlaceReason.FORWARD_MODE]
    assert [row.reason for row in capture.only.report.rows] == [str(PlaceReason.FORWARD_MODE())]


@pytest.mark.parametrize("view", [lambda w: w.T, lambda w: w.mT, lambda w: w.t()], ids=["T", "mT", "t"])
def test_a_view_of_a_weight_that_is_taken_around_a_body(view: Any) -> None:
    """Dynamo takes attributes of a tensor outside, wherever they are written."""

    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 32)

        def forward(self, x: Tensor) -> Any:
            return checkpoint(lambda y: torch.tanh(y @ view(self.fc.weight)), x, use_reentrant=False)

    capture = Capture(fp8fx.Config())
    torch.compile(Viewed(), backend=capture)(torch.randn(8, 64))
    assert [(row.name, row.reason) for row in capture.only.report.rows] == [("fc.weight", None)]


class Wrapped(nn.Module):
    """Linears in what torch.export makes bodies of: autocast, grad mode and a cond."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.yes, self.no = (nn.Linear(64, 64) for _ in range(4))
        self.register_buffer("stored", torch.randn(64, 64) / 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = torch.tanh(self.up(x))
        with torch.no_grad():
            y = self.down(x.float()) @ self.stored
        return torch.cond(y.sum() > 0, lambda y: self.yes(y), lambda y: self.no(y), (y,))


def test_bodies_of_an_exported_graph() -> None:
    model, x = Wrapped(), torch.randn(8, 64)
    new = fp8fx.convert(torch.export.export(model, (x,)), exclude=("no.weight",))
    found = {row.name: row.reason for row in new.meta["fp8fx_report"].rows}
    assert found == {
        "up.weight": None,
        "down.weight": None,
        "stored": None,
        "yes.weight": None,
        "no.weight": "excluded by 'no.weight'",
    }

    def mm(layer: nn.Linear, x: Tensor) -> Tensor:
        return op("mixed")(x, layer.weight.t(), bias=layer.bias)  # type: ignore[no-any-return]

    with torch.autocast("cpu", torch.bfloat16):
        y = torch.tanh(mm(model.up, x))
    y = op("mixed")(mm(model.down, y.float()), model.stored)
    assert torch.equal(new(x), mm(model.yes, y) if y.sum() > 0 else model.no(y))


def test_a_body_with_nothing_to_rewrite_stays_the_same_object() -> None:
    graphs: list[Any] = []

    def keep(gm: Any, inputs: Any) -> Any:
        graphs.append((gm, fp8fx.convert(gm, inputs, include=())))
        return gm.forward

    torch.compile(Branching(), backend=keep)(torch.rand(4, 64))
    ((before, after),) = graphs
    assert [id(body) for _, body in before.named_children()] == [id(body) for _, body in after.named_children()]


def test_a_body_further_down_is_the_one_that_runs() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda y: self.a(y), lambda y: y + 1, (self.b(x),))  # type: ignore[no-any-return]

    gm, x = (
        torch.export.export(Model().requires_grad_(False), (torch.randn(4, 32).abs(),)).module(),
        torch.randn(4, 32).abs(),
    )
    expected = fp8fx.convert(gm)(x)
    gm.sub = nn.Module()
    gm.sub.body = original = gm.true_graph_0
    for node in gm.graph.find_nodes(op="get_attr", target="true_graph_0"):
        node.target = "sub.body"
    gm.recompile()
    new = fp8fx.convert(gm)
    assert torch.equal(new(x), expected)
    assert len(new.meta["fp8fx_report"].rewritten) == 2
    assert gm.sub.body is original
