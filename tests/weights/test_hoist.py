"""FP8 weights that the body of a higher-order operator reads: read in front of the call, as plain tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.checkpoint import checkpoint

import fp8fx
from fp8fx.graph.bodies import has_flat_inputs
from tests.support.numbers import error


@pytest.fixture(autouse=True)
def _traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """AOTAutograd, which takes a graph apart as Inductor would get it, and no compiler behind it."""
    monkeypatch.setattr("fp8fx.lowering.compile_fx", lambda gm, inputs, *inner, config_patches: aot_eager(gm, inputs))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))
        self.out = nn.Linear(32, 32)

    def block(self, x: Tensor) -> Tensor:
        return self.out((self.q(x) * self.k(x)).tanh() + self.v(x))


class Once(Net):
    def forward(self, x: Tensor) -> Tensor:
        return x + checkpoint(self.block, x, use_reentrant=False)


class Twice(Net):
    """Calls it with the same weights again, and reads one of them itself."""

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.block, x, use_reentrant=False)
        x = checkpoint(self.block, x, use_reentrant=False)
        return x + self.out(x) + self.v.weight.sum()


class Nested(Net):
    def outer(self, x: Tensor) -> Tensor:
        return self.out(checkpoint(self.block, x, use_reentrant=False))

    def forward(self, x: Tensor) -> Tensor:
        return x + checkpoint(self.outer, x, use_reentrant=False)


class Norm(Net):
    """A body that reads a weight as something else than a linear."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda x: x * self.q.weight.norm(dim=1), x, use_reentrant=False) + self.out(x)


def _run(model: nn.Module, call: object, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = call(x)  # type: ignore[operator]
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    return y.detach(), grad


@pytest.mark.parametrize(("kind", "rows"), [(Once, 4), (Twice, 9), (Nested, 5), (Norm, 1)])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_checkpoint(kind: type[Net], rows: int, autocast: bool) -> None:
    model = kind().requires_grad_(False)
    fp8fx.freeze(model)
    backend = fp8fx.Backend()
    compiled = torch.compile(model, backend=backend)
    x = torch.randn(8, 32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, grad = _run(model, model, x)
        given, given_grad = _run(model, compiled, x)
        assert error(given, y) < 0.01
        assert error(given_grad, grad) < 0.01
        (report,) = backend.reports
        assert len(report.rewritten) == rows
        # A weight that was written to since is read as it is now.
        with torch.no_grad():
            model.q.weight.mul_(2)
        assert error(_run(model, compiled, x)[0], _run(model, model, x)[0]) < 0.01
        assert error(_run(model, compiled, x)[0], y) > 0.01
    assert len(backend.reports) == 1


def test_the_compiled_graph_has_no_fp8_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Once().requires_grad_(False)
    fp8fx.freeze(model)
    graphs = []

    def compile_fx(gm: torch.fx.GraphModule, inputs: list[Tensor], *inner: object, config_patches: object) -> object:
        graphs.append((gm, inputs))
        return gm.forward

    monkeypatch.setattr("fp8fx.lowering.compile_fx", compile_fx)
    torch.compile(model, backend="fp8")(torch.randn(8, 32))
    ((gm, inputs),) = graphs
    assert {type(x) for x in inputs} <= {Tensor, nn.Parameter}
    (call,) = [node for node in gm.graph.nodes if has_flat_inputs(node)]
    body = gm.get_submodule(str(call.args[0].target))
    assert not any(node.target is getattr for graph in (gm.graph, body.graph) for node in graph.nodes)
    assert len(body.graph.find_nodes(op="placeholder")) == len(call.args) - 1


def test_a_condition_quantizes_the_dequantized_values() -> None:
    class Condition(Net):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, self.q, self.k, (x,))

    model = Condition().requires_grad_(False)
    fp8fx.freeze(model)
    compiled = torch.compile(model, backend="fp8")
    with torch.no_grad():
        x = torch.rand(8, 32)
        assert error(compiled(x), model.q(x)) < 0.1
        assert error(compiled(-x), model.k(-x)) < 0.1
