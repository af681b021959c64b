"""wgrad_first: dgrad waits for the wgrad whose activation is computed for it alone; no other order is imposed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.fx_passes.control_dependencies import control_deps
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

from fp8fx.passes.inductor import invert_once, store_once, wgrad_first
from tests.support.capture import ops
from tests.support.casts import E4M3, E5M2, cast, scaled_mm

MM, SCALED_MM = torch.ops.aten.mm.default, torch.ops.aten._scaled_mm.default
Results = tuple[Tensor, ...]


def recomputed(x: Tensor, g: Tensor, w: Tensor, s: Tensor) -> Results:
    """dgrad stands before wgrad, as autograd puts it."""
    return scaled_mm(cast(g, s, E5M2), w.t(), s), g.t() @ x.tanh()


def column_major(x: Tensor, g: Tensor, w: Tensor, s: Tensor) -> Results:
    """A weight (K, N), and a gradient in three dimensions."""
    rows = g.view(4, 8, 64).view(32, 64)
    return scaled_mm(cast(rows, s, E5M2), w.t(), s), x.tanh().t() @ rows


def saved(x: Tensor, g: Tensor, w: Tensor, s: Tensor) -> Results:
    return scaled_mm(cast(g, s, E5M2), w.t(), s), g.t() @ x


def siblings(x: Tensor, g: Tensor, w: Tensor, s: Tensor) -> Results:
    """The activation stays for the second wgrad whatever comes first."""
    a, h = x.tanh(), g * 2
    return scaled_mm(cast(g, s, E5M2), w.t(), s), g.t() @ a, h.t() @ a


def no_wgrad(x: Tensor, g: Tensor, w: Tensor, s: Tensor) -> Results:
    return scaled_mm(cast(g, s, E5M2), w.t(), s), x.t() @ x.tanh()


def forward(x: Tensor, g: Tensor, w: Tensor, s: Tensor) -> Results:
    return scaled_mm(cast(g, s, E4M3), w.t(), s), g.t() @ x.tanh()


def of_its_own_dgrad(x: Tensor, g: Tensor, w: Tensor, s: Tensor) -> Results:
    """To wait for it would be to wait for itself."""
    dgrad = scaled_mm(cast(g, s, E5M2), w.t(), s)
    return dgrad, g.t() @ dgrad.tanh()


Function = Callable[..., Results]


def arguments() -> tuple[Tensor, ...]:
    return torch.randn(32, 64), torch.randn(32, 64), torch.randn(48, 64).to(E4M3), torch.tensor(0.01)


@pytest.mark.parametrize("function", [recomputed, column_major])
def test_dgrad_waits_for_wgrad(function: Function) -> None:
    inputs = arguments()
    gm, before = make_fx(function)(*inputs), make_fx(function)(*inputs)
    wgrad_first.run(gm.graph)
    assert ops(gm.graph) == ops(before.graph) - Counter({SCALED_MM: 1}) + Counter({control_deps: 1})
    (waiting,), (mm,) = (gm.graph.find_nodes(op="call_function", target=target) for target in (control_deps, MM))
    assert waiting.args[0] == (mm,)
    assert getattr(gm, waiting.args[1].target).graph.find_nodes(op="call_function", target=SCALED_MM)


@pytest.mark.parametrize("function", [saved, siblings, no_wgrad, forward, of_its_own_dgrad])
def test_no_match_leaves_the_graph_unchanged(function: Function) -> None:
    gm = make_fx(function)(*arguments())
    before = str(gm.graph)
    wgrad_first.run(gm.graph)
    assert str(gm.graph) == before


def test_twice_is_once() -> None:
    gm = make_fx(recomputed)(*arguments())
    wgrad_first.run(gm.graph)
    once = str(gm.graph)
    wgrad_first.run(gm.graph)
    assert str(gm.graph) == once


@pytest.mark.compiles
@pytest.mark.parametrize("function", [recomputed, column_major])
def test_inductor_computes_wgrad_first_and_changes_no_bit(function: Function) -> None:
    inputs, orders = arguments(), []

    def compiled(*passes: Any) -> Results:
        torch._dynamo.reset()
        options = {"post_grad_custom_post_pass": lambda graph: [one.run(graph) for one in passes]}
        out, (code,) = run_and_get_code(torch.compile(function, options=options), *inputs)
        orders.append(code.index("extern_kernels.mm(") < code.index("extern_kernels._scaled_mm("))
        return out

    without, out = compiled(), compiled(store_once, invert_once, wgrad_first)
    assert orders == [False, True]
    assert all(torch.equal(x, y) for x, y in zip(out, without, strict=True))
