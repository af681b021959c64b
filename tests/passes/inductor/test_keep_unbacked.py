"""keep_unbacked: what has a size that depends on data is marked, and the gradients behind it are right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo import config as dynamo_config
from torch.utils.checkpoint import CheckpointPolicy

from fp8fx.ops.matmul import op
from fp8fx.passes.inductor import keep_unbacked, share
from tests.support.training import FLIPS, assert_near, fp8

SAVE, RECOMPUTE = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.MUST_RECOMPUTE


class Masked(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        y = x.tanh()
        return y[mask], y[mask.logical_not()].relu()


class Nothing(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, x.tanh(), 0)


def graph(module: nn.Module) -> fx.Graph:
    mask = torch.arange(16).reshape(2, 8) % 3 == 0
    return torch.export.export(module, (torch.randn(2, 8), mask)).run_decompositions({}).graph


def marked(graph: fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.meta.get("recompute") is SAVE]


def test_what_has_a_size_that_depends_on_data_is_marked() -> None:
    found = graph(Masked())
    before = str(found)
    for one in (keep_unbacked, share, keep_unbacked):
        one.run(found)
    assert marked(found) == ["aten.index.Tensor"] * 2
    assert str(found) == before


def test_no_match_marks_nothing() -> None:
    found = graph(Nothing())
    keep_unbacked.run(found)
    assert marked(found) == []


def test_what_the_user_checkpoints_is_the_user_s() -> None:
    found = graph(Masked())
    first, _ = found.find_nodes(op="call_function", target=torch.ops.aten.index.Tensor)
    first.meta["recompute"] = RECOMPUTE
    keep_unbacked.run(found)
    assert first.meta["recompute"] is RECOMPUTE
    assert len(marked(found)) == 1


Linear = Callable[[Tensor], Tensor]


def masked(first: Linear, second: Linear, x: Tensor, mask: Tensor) -> Tensor:
    return second(torch.relu(first(x))[mask]).square().sum()


def nonzero(first: Linear, second: Linear, x: Tensor, mask: Tensor) -> Tensor:
    rows = mask.flatten().nonzero()[:, 0]
    return second(torch.relu(first(x)).flatten(0, 1)[rows]).square().sum()


def as_many_as(first: Linear, second: Linear, x: Tensor, mask: Tensor) -> Tensor:
    n = mask.sum().item()
    torch._check(n >= 0)
    torch._check(n <= 16)  # or Inductor itself fails
    return second(torch.relu(first(x)).flatten(0, 1)[:n]).square().sum()


def written(first: Linear, second: Linear, x: Tensor, mask: Tensor) -> Tensor:
    """In place, by index_put."""
    h = torch.relu(first(x))
    y = h.clone()
    y[mask] = second(h[mask].tanh()).relu()
    return y.square().sum()


@pytest.mark.compiles
@pytest.mark.parametrize("function", [masked, nonzero, as_many_as, written])
def test_gradients_behind_a_size_that_depends_on_data(function: Callable[..., Tensor]) -> None:
    model = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])
    x, mask = torch.randn(2, 8, 64, requires_grad=True), torch.zeros(16, dtype=torch.bool)
    mask[[1, 4, 5, 9, 14]] = True
    by_hand = [lambda x, linear=linear: op("mixed")(x, linear.weight.t(), bias=linear.bias) for linear in model]
    with dynamo_config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
        compiled, backend = fp8(lambda x, mask: function(*model, x, mask), "mixed", fullgraph=True)
        outs = compiled(x, mask.view(2, 8)), function(*by_hand, x, mask.view(2, 8))
    assert len(backend.reports[0].rewritten) == 2
    found, expected = ([out, *torch.autograd.grad(out, (x, *model.parameters()))] for out in outs)
    assert_near(found, expected, FLIPS)
