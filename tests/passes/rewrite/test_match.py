"""match: every matmul of the graph becomes a LinearMatch or a Refusal, and the graph stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from fp8fx.graph.values import fake
from fp8fx.passes.rewrite import match
from fp8fx.pipeline import Rewrite
from tests.support.capture import Capture, after


class Model(nn.Module):
    """Three linears, of which one feeds another twice, and two matmuls that are none."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 6)
        self.out = nn.Linear(6, 6, bias=False)
        self.w = nn.Parameter(torch.randn(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        h = self.out(self.out(h)) + h
        return (h @ self.w).T @ (h @ h.T) + F.relu(h).sum()


def test_count_and_order() -> None:
    rewrite = after([match], Model())
    assert [m.name for m in rewrite.matches] == ["fc.weight", "out.weight", "out.weight", "w"]
    assert [str(r.reason) for r in rewrite.refusals] == ["activation times activation"] * 2
    assert [node.name for node in rewrite.seen] == ["fc", "out", "out_1", "matmul", "matmul_1", "matmul_2"]
    assert [n for n in rewrite.seen if n.name in ("matmul_1", "matmul_2")] == [r.node for r in rewrite.refusals]
    (result,) = rewrite.results
    assert (result.name, result.count, result.modified) == ("match", 4, False)


def test_the_graph_stays_as_it_is() -> None:
    gm = fx.symbolic_trace(Model())
    rewrite = after([match], gm)
    assert str(rewrite.gm.graph) == str(gm.graph)
    assert rewrite.gm.code == gm.code


def test_no_matmul() -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.ReLU(), nn.Flatten()))
    rewrite = after([match], gm, (torch.randn(2, 3),))
    assert (rewrite.seen, rewrite.matches, rewrite.refusals) == ([], [], [])
    assert rewrite.results[0].count == 0
    assert str(rewrite.gm.graph) == str(gm.graph)


def test_example_inputs_tell_the_sizes() -> None:
    first = after([match], Model()).matches[0]
    assert (first.m, first.k, first.n) == (None, 8, 6)
    rewrite = after([match], Model(), (torch.randn(4, 8),))
    assert [(m.m, m.k, m.n) for m in rewrite.matches] == [(4, 8, 6), (4, 6, 6), (4, 6, 6), (4, 6, 5)]
    assert [(r.m, r.k, r.n) for r in rewrite.refusals] == [(4, 6, 4), (5, 4, 4)]


def test_example_inputs_fill_in_the_values() -> None:
    rewrite = after([match], Model(), (torch.randn(4, 8),))
    assert [tuple(fake(m.node).shape) for m in rewrite.matches] == [(4, 6), (4, 6), (4, 6), (4, 5)]  # type: ignore[union-attr]
    assert fake(after([match], Model()).matches[0].node) is None


def test_a_weight_that_is_an_input() -> None:
    gm, x, w = fx.symbolic_trace(lambda x, w: x @ w.t()), torch.randn(4, 8), torch.randn(6, 8)
    assert not after([match], gm, (x, w)).matches
    (found,) = after([match], gm, (x, nn.Parameter(w))).matches
    assert (found.name, found.m, found.k, found.n) == ("w", 4, 8, 6)


# What the graph itself writes.


class Cache(nn.Module):
    """Keys in a buffer and experts in a parameter, both (3, 16, 16), and a function of them and of two inputs of that
    shape."""

    def __init__(self, function: Callable[[Cache, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("keys", torch.zeros(3, 16, 16, dtype=torch.bfloat16))
        self.experts = nn.Parameter(torch.randn(3, 16, 16, dtype=torch.bfloat16), requires_grad=False)

    def forward(self, q: Tensor, k: Tensor) -> Any:
        return self.function(self, q, k)


OFFS = torch.tensor([2, 9, 16], dtype=torch.int32)

STATES: dict[str, Callable[[Cache, Tensor, Tensor], Any]] = {
    "bmm": lambda p, q, k: (p.keys.copy_(k), torch.bmm(q, p.keys))[1],
    "a view": lambda p, q, k: (p.keys[:, 1].copy_(k[:, 0]), q @ p.keys.mT)[1],
    "on the left": lambda p, q, k: (p.keys.add_(k), p.keys[0] @ q[0])[1],
    "2-D": lambda p, q, k: (p.keys.add_(k), torch.mm(q[0], p.keys[0]))[1],
    "baddbmm": lambda p, q, k: (p.keys.add_(k), torch.baddbmm(k, q, p.keys))[1],
    "einsum": lambda p, q, k: (p.keys.add_(k), torch.einsum("bqd,bkd->bqk", q, p.keys))[1],
    "einsum, not batched": lambda p, q, k: (p.keys.add_(k), torch.einsum("bqd,kd->bqk", q, p.keys[0]))[1],
    "grouped_mm": lambda p, q, k: (p.keys.add_(k), F.grouped_mm(q[0], p.keys, offs=OFFS))[1],
}
WEIGHTS: dict[str, Callable[[Cache, Tensor, Tensor], Any]] = {
    "F.linear, called a weight": lambda p, q, k: (p.keys.copy_(k), F.linear(q, p.keys[0]))[1],
    "addmm": lambda p, q, k: (p.keys.copy_(k), torch.addmm(k[0], q[0], p.keys[0]))[1],
    "read before it is written": lambda p, q, k: (torch.bmm(q, p.keys), p.keys.copy_(k))[0],
    "a parameter": lambda p, q, k: (p.experts.copy_(k), torch.bmm(q, p.experts))[1],
    "a copy that is written": lambda p, q, k: (p.keys.clone().copy_(k), torch.bmm(q, p.keys))[1],
}


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True


def rewrites(function: Callable[[Cache, Tensor, Tensor], Any]) -> list[Rewrite]:
    """Of Dynamo's graph and of symbolic_trace's."""
    model, inputs, found = Cache(function), torch.randn(2, 3, 16, 16, dtype=torch.bfloat16).unbind(), Capture()
    torch.compile(model, backend=found, fullgraph=True)(*inputs)
    return [after([match], found.only.before), after([match], fx.GraphModule(model, _Tracer().trace(model)), inputs)]


@pytest.mark.parametrize("form", STATES)
def test_a_buffer_that_the_graph_has_written_is_an_activation(form: str) -> None:
    for rewrite in rewrites(STATES[form]):
        assert ([m.spelling for m in rewrite.matches], [str(r.reason) for r in rewrite.refusals]) == (
            [],
            ["activation times activation"],
        )


@pytest.mark.parametrize("form", WEIGHTS)
def test_other_weights_that_the_graph_writes_stay_weights(form: str) -> None:
    for rewrite in rewrites(WEIGHTS[form]):
        assert ([m.name for m in rewrite.matches], rewrite.refusals) == (
            ["experts" if form == "a parameter" else "keys"],
            [],
        )


def test_a_step_of_training_traced_as_a_whole_keeps_its_linears() -> None:
    w, v, x = (nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(6, 6)), torch.randn(4, 8))

    def step(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        loss = F.linear(F.linear(x, w), v).square().sum()
        grads = torch.autograd.grad(loss, (w, v))
        with torch.no_grad():
            for p, grad in zip((w, v), grads, strict=True):
                p.sub_(grad, alpha=0.1)
        return loss

    gm = make_fx(step, pre_dispatch=True)(x, w.detach().requires_grad_(), v.detach().requires_grad_())
    rewrite = after([match], gm, (x, w, v))
    assert [m.name for m in rewrite.matches if m.spelling == "aten.linear"] == ["w_1", "v_1"]
