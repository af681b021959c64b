"""amax_by_rows: large tensors are reduced by long rows, with the same result; others are left alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

import fp8fx
from fp8fx.passes.inductor import amax_by_rows
from tests.support.capture import ops

aten = torch.ops.aten
Function = Callable[[Tensor], Tensor]


def weight(x: Tensor) -> Tensor:
    return x.abs().amax()


def transposed(x: Tensor) -> Tensor:
    return x.t().t().abs().amax()


def computed(x: Tensor) -> Tensor:
    return x.tanh().abs().amax()


def changed(function: Function, x: Tensor) -> tuple[Tensor, Tensor, Counter[str]]:
    """What the pass makes of it, what it was, and the ops that it adds."""
    gm, before = make_fx(function)(x), make_fx(function)(x)
    amax_by_rows.run(gm.graph)
    gm.graph.lint()
    for node in gm.graph.find_nodes(op="call_function", target=aten.amax.default):
        assert (
            node.meta["val"].shape
            == node.target(*(a.meta["val"] if hasattr(a, "meta") else a for a in node.args)).shape
        )
    gm.recompile()
    return gm(x), before(x), ops(gm.graph) - ops(before.graph)


@pytest.mark.parametrize("bad", [None, math.nan, -math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("function", "shape", "view"),
    [
        (weight, (2048, 4096), True),
        (transposed, (4096, 2048), True),
        (computed, (512, 8192), False),
        (computed, (2, 256, 8192), False),
    ],
)
def test_by_rows(function: Function, shape: tuple[int, ...], view: bool, dtype: torch.dtype, bad: float | None) -> None:
    x = torch.randn(shape, dtype=dtype)
    if bad is not None:
        x[-1, ..., 3] = bad
    found, expected, added = changed(function, x)
    assert torch.equal(found, expected) or bool(found.isnan() & expected.isnan())
    assert added == Counter({aten.amax.default: 1} | ({aten.view.default: 1} if view else {}))


@pytest.mark.parametrize(
    ("function", "x"),
    [
        (weight, torch.randn(1024, 4096)),  # too small
        (weight, torch.randn(2049, 4097)),  # no multiple of a row
        (weight, torch.randn(4096, 2048).t()),  # not in the order that it lies in
        (weight, torch.randn(2048, 4096)[:, ::2]),  # not all of what lies there
        (lambda x: x[:2048].abs().amax(), torch.randn(4096, 4096)),
        (lambda x: x.expand(4, 1 << 21).abs().amax(), torch.randn(1, 1 << 21)),
        (computed, torch.randn(2048, 4096)),  # a norm's rows
        (computed, torch.randn(256, 8192)),  # few rows
        (lambda x: x.amax(), torch.randn(2048, 4096)),  # no magnitudes
        (lambda x: x.abs().amax(-1), torch.randn(2048, 4096)),
        (lambda x: x.abs().amax(-1, keepdim=True), torch.randn(512, 8192)),
    ],
)
def test_left_alone(function: Function, x: Tensor) -> None:
    assert not changed(function, x)[2]


@pytest.mark.compiles
def test_through_inductor_the_scale_stays_the_same() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(4096, 2048, bias=False)
    x, backend = torch.randn(16, 4096), fp8fx.Backend(fp8fx.Config(recipe="global", profit="always"))
    with torch.no_grad():
        found, (code,) = run_and_get_code(torch.compile(model, backend=backend), x)
        expected = torch.ops.fp8fx.matmul_fp8_global(x, model.weight.t())
    assert "16384" in code and "_abs_amax_" in code
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
