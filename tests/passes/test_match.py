"""match: every matmul of the graph becomes a LinearMatch or a Refusal, and the graph stays as it is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fp8fx.graph import fake
from fp8fx.passes import match
from tests.capture import after


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
    assert [r.reason for r in rewrite.refusals] == ["activation times activation"] * 2
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
