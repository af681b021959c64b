"""A graph whose rewrite fails is compiled as it is, one of whose own a pass fails without that pass, and both say
why."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch._inductor.utils import fresh_cache

import fp8fx
from fp8fx.errors import GraphError
from fp8fx.ops.matmul import op
from fp8fx.passes.inductor import amax_by_rows, store_once
from fp8fx.passes.rewrite import check
from fp8fx.pipeline import Rewrite


class Broken(nn.Module):
    """Two graphs, of which the first has a tanh."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        torch._dynamo.graph_break()
        return self.second(x)


@pytest.mark.compiles
@pytest.mark.parametrize("error", [GraphError("an odd graph"), IndexError("a fault of a pass")], ids=["typed", "ours"])
def test_only_the_graph_that_cannot_be_rewritten_stays_as_it_is(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    legal = check.run

    def run(rewrite: Rewrite) -> int:
        if any(node.target == "tanh" for node in rewrite.gm.graph.nodes):
            raise error
        return legal(rewrite)

    monkeypatch.setattr(check, "run", run)
    model, x, backend, why = (
        Broken(),
        torch.randn(4, 16, requires_grad=True),
        fp8fx.Backend(),
        rf"its rewrite failed: .*{error}",
    )
    with pytest.warns(fp8fx.FP8Warning, match=why):
        out = torch.compile(model, backend=backend)(x)
    expected = op("mixed")(model.first(x).tanh(), model.second.weight.t(), bias=model.second.bias)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(y.sum(), [x, *model.parameters()]) for y in (out, expected)]
    for value, reference in zip(*grads, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-5)
    assert [len(report.rewritten) for report in backend.reports] == [0, 1]
    assert [report.failures for report in backend.reports] == [(f"{type(error).__name__}: {error}",), ()]

    report = fp8fx.explain(model, x)
    assert (report.graphs, [row.path for row in report.rewritten]) == (2, ["second"])
    assert str(report).splitlines()[-1] == (
        "1 of 1 matmuls rewritten, share of the matmul FLOPs: 100.0%; "
        f"a graph was left as it is, its rewrite failed: {type(error).__name__}: {error}"
    )
    with pytest.raises(type(error), match=str(error)):  # who converts a graph has asked for that one
        fp8fx.convert(fx.symbolic_trace(lambda x: x.tanh()))


@pytest.mark.parametrize("options", [{"executor": "scaled_mm"}, {"executor": "bitsandbytes", "freeze": True}], ids=str)
def test_what_was_asked_for_and_cannot_be_had_is_an_error(options: dict[str, object]) -> None:
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        torch.compile(nn.Linear(16, 16), backend="fp8", options=options)(torch.randn(4, 16))
    assert isinstance(caught.value.inner_exception, fp8fx.FP8Error)


@pytest.mark.compiles
def test_a_graph_is_compiled_without_a_pass_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def half(graph: fx.Graph) -> None:
        """Breaks the graph, and then fails."""
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.amax.default):
            node.target = torch.ops.aten.amin.default
        raise IndexError("a fault of a pass")

    half.__module__ = store_once.__name__
    ran = []

    def after(graph: fx.Graph) -> None:
        ran.append(graph)

    after.__module__ = amax_by_rows.__name__
    monkeypatch.setattr("fp8fx.lowering.HOOKS", {"post_grad_custom_post_pass": (half, after)})
    model, x, backend = (
        nn.Sequential(nn.Linear(48, 32), nn.Tanh()),
        torch.randn(4, 48, requires_grad=True),
        fp8fx.Backend(),
    )
    why = "store_once: IndexError: a fault of a pass"

    def step(model: nn.Module) -> list[Tensor]:
        out = model(x)
        return [out, *torch.autograd.grad(out.square().sum(), [x, *model.parameters()])]

    with (
        torch._inductor.config.patch(force_disable_caches=True),
        pytest.warns(fp8fx.FP8Warning, match=f"compiled without .*, {why}"),
    ):
        found = step(torch.compile(model, backend=backend))
    for value, reference in zip(found, step(fp8fx.convert(model)), strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-5)
    assert len(ran) == 2  # of forward and of backward
    (report,) = backend.reports
    assert (len(report.rewritten), report.skipped) == (1, (why, why))
    assert report.summary.endswith(f"a graph was compiled without a pass that failed, {why}")
    assert fp8fx.Report.merged([report, report]).skipped == (why,) * 4


@pytest.mark.compiles
def test_a_pass_that_fails_after_the_reports_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(graph: fx.Graph) -> None:
        raise IndexError("a fault of a pass")

    fails.__module__ = store_once.__name__
    monkeypatch.setattr("fp8fx.lowering.HOOKS", {"post_grad_custom_post_pass": (fails,)})
    model, x, backend = (
        nn.Sequential(nn.Linear(48, 32), nn.Tanh()),
        torch.randn(4, 48, requires_grad=True),
        fp8fx.Backend(),
    )
    with torch._inductor.config.patch(force_disable_caches=True):
        with pytest.warns(fp8fx.FP8Warning, match="compiled without"):
            out = torch.compile(model, backend=backend)(x)
        torch._dynamo.reset()  # before backward is compiled
        assert backend.reports == []
        with pytest.warns(fp8fx.FP8Warning, match="compiled without"):
            out.sum().backward()
    assert backend.reports == []


def planted(monkeypatch: pytest.MonkeyPatch, run: Callable[[fx.Graph], None]) -> None:
    """Has `run` be the only pass of ours over compiled graphs."""
    run.__module__ = store_once.__name__
    monkeypatch.setattr("fp8fx.lowering.HOOKS", {"post_grad_custom_post_pass": (run,)})


def step(call: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    out = call(x)
    return [out, *torch.autograd.grad(out.square().sum(), [x, *model.parameters()])]


def is_backward(graph: fx.Graph) -> bool:
    return any("tangents" in node.name for node in graph.find_nodes(op="placeholder"))


@pytest.mark.compiles
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_graph_is_compiled_without_passes_that_make_inductor_fail(
    backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(graph: fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.abs.default):
            if is_backward(graph) is backward:
                node.target = torch.ops.aten.nonzero_static.default  # which lacks an argument

    planted(monkeypatch, spoil)
    model, x, backend = (
        nn.Sequential(nn.Linear(48, 32), nn.Tanh()),
        torch.randn(4, 48, requires_grad=True),
        fp8fx.Backend(),
    )
    why = "compiled without a pass that failed, store_once: "
    with torch._inductor.config.patch(force_disable_caches=True), pytest.warns(fp8fx.FP8Warning, match=why) as caught:
        found = step(torch.compile(model, backend=backend), model, x)
    assert len([one for one in caught if one.category is fp8fx.FP8Warning]) == 1
    for value, reference in zip(found, step(fp8fx.convert(model), model, x), strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-5)
    (report,) = backend.reports
    assert (len(report.rewritten), len(report.skipped)) == (1, 1)


@pytest.mark.compiles
def test_a_graph_whose_ops_cannot_be_compiled_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def quantize(*args: object) -> None:
        raise IndexError("a fault of an op")

    monkeypatch.setattr("fp8fx.executors.simulated.Simulated.quantize", quantize)
    model, x, backend = (
        nn.Sequential(nn.Linear(48, 32), nn.Tanh()),
        torch.randn(4, 48, requires_grad=True),
        fp8fx.Backend(),
    )
    with pytest.warns(fp8fx.FP8Warning, match="its rewrite failed: .*a fault of an op"):
        found = step(torch.compile(model, backend=backend), model, x)
    for value, reference in zip(found, step(model, model, x), strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-5)
    (report,) = backend.reports
    assert report.rows == () and len(report.failures) == 1


@pytest.mark.compiles
@pytest.mark.parametrize("how", ["raises", "makes Inductor fail"])
def test_what_was_compiled_without_a_pass_is_not_cached(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def run(graph: fx.Graph) -> None:
        ran.append(graph)
        if fails and how == "raises":
            raise IndexError("a fault of a pass")
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.abs.default):
            if fails:
                node.target = torch.ops.aten.nonzero_static.default

    planted(monkeypatch, run)
    model, x = nn.Linear(24, 40), torch.randn(4, 24, requires_grad=True)
    expected = step(fp8fx.convert(model), model, x)
    with fresh_cache():
        for fails_now, warned, most in ((True, 2, 4), (True, 2, 4), (False, 0, 2), (False, 0, 0)):
            fails = fails_now
            torch._dynamo.reset()
            ran.clear()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found = step(torch.compile(model, backend="fp8"), model, x)
            assert len([one for one in caught if one.category is fp8fx.FP8Warning]) == warned
            assert len(ran) <= most and bool(ran) == bool(most)  # the last time, both graphs are in the cache
            for value, reference in zip(found, expected, strict=True):
                torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.compiles
def test_a_pass_of_the_user_s_own_that_fails_is_the_user_s() -> None:
    def own(graph: fx.Graph) -> None:
        raise IndexError("a fault of the user's")

    with torch.no_grad(), pytest.raises(Exception, match="a fault of the user's"):
        torch.compile(nn.Linear(16, 16), backend="fp8", options={"post_grad_custom_post_pass": own})(torch.randn(4, 16))
