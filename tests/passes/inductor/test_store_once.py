"""store_once: what several GEMMs read is written once; what one reads, what lies in memory already, or what is expanded
is left alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._inductor.compile_fx import compile_fx
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

from fp8fx.ops.matmul import op
from fp8fx.passes.inductor import invert_once, store_once
from fp8fx.torch_internals import REALIZE
from tests.support.casts import E4M3, E5M2, cast, scaled_mm


def siblings(x: Tensor, v: Tensor, w: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    x8 = cast(x, s)
    return scaled_mm(x8, v.t(), s), scaled_mm(x8, w.t(), s), x8.float()


def both_ways(x: Tensor, v: Tensor, w: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    """One reads it as it is, the other transposed; it is column-major."""
    x8 = cast(x.t(), s)
    return scaled_mm(x8.t(), v.t(), s), scaled_mm(w[:, :32].contiguous(), x8.t(), s)


def dgrad_and_wgrad(x: Tensor, v: Tensor, w: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    """A gradient that dgrad reads in FP8 and wgrad as it is."""
    g = x.tanh()
    return scaled_mm(cast(g, s, E5M2), v.t(), s), g.t() @ x


def one_reader(x: Tensor, v: Tensor, w: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    x8 = cast(x, s)
    return scaled_mm(x8, v.t(), s), scaled_mm(cast(x + 1, s), w.t(), s), x8.float()


def one_reader_twice(x: Tensor, v: Tensor, w: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    x8 = cast(x, s)
    return (scaled_mm(x8, x8.t(), s),)


def inputs_already(x: Tensor, v: Tensor, w: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    return scaled_mm(v, w.t(), s), scaled_mm(v, v.t(), s), scaled_mm(cast(x, s, E5M2), v.t(), s), x.t() @ x


def wgrads_alone(x: Tensor, v: Tensor, w: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    """Inductor itself writes what `mm` reads."""
    g = x.tanh()
    return g.t() @ x, g @ x.t()


def a_sum(x: Tensor, v: Tensor, w: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    """Its gradient is one value, repeated."""
    g = x[0, 0].expand(32, 64)
    return scaled_mm(cast(g, s, E5M2), v.t(), s), g.t() @ x


def a_sum_of_rows(x: Tensor, v: Tensor, w: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    g = x[:1].expand(32, 64)
    return scaled_mm(cast(g, s, E5M2), v.t(), s), g.t() @ x


Function = Callable[..., tuple[Tensor, ...]]


def arguments() -> tuple[Tensor, ...]:
    v, w = (torch.randn(48, 64).to(E4M3) for _ in range(2))
    return torch.randn(32, 64), v, w, torch.tensor(0.01)


def marked(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.meta.get(REALIZE)]


@pytest.mark.parametrize(
    ("function", "dtype", "strides"),
    [(siblings, E4M3, (64, 1)), (both_ways, E4M3, (1, 64)), (dgrad_and_wgrad, torch.float32, (64, 1))],
)
def test_what_several_gemms_read_is_stored_once(
    function: Function, dtype: torch.dtype, strides: tuple[int, ...]
) -> None:
    gm = make_fx(function)(*arguments())
    before = str(gm.graph)
    store_once.run(gm.graph)
    assert str(gm.graph) == before
    (stored,) = marked(gm.graph)
    assert (stored.meta["val"].dtype, stored.meta["val"].stride()) == (dtype, strides)


@pytest.mark.parametrize("function", [one_reader, one_reader_twice, inputs_already, wgrads_alone, a_sum, a_sum_of_rows])
def test_no_match_marks_nothing(function: Function) -> None:
    gm = make_fx(function)(*arguments())
    store_once.run(gm.graph)
    assert marked(gm.graph) == []


def test_chain_and_twice() -> None:
    gm = make_fx(siblings)(*arguments())
    for one in (store_once, invert_once, store_once, invert_once):
        one.run(gm.graph)
    assert len(marked(gm.graph)) == 1


@pytest.mark.compiles
def test_any_m_runs_in_one_compilation() -> None:
    """What wgrad reads has M values a row: M is a stride."""
    count = 0

    def transposed(x: Tensor, v: Tensor, w: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        x8 = cast(x.t(), s).contiguous()
        return scaled_mm(v, x8.t(), s), scaled_mm(w, x8.t(), s)

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        nonlocal count
        count += 1
        compiled: Callable[..., Any] = compile_fx(
            gm, example_inputs, config_patches={"post_grad_custom_post_pass": store_once.run}
        )
        return compiled

    call, s = torch.compile(transposed, backend=backend, dynamic=True), torch.tensor(0.01)
    for m in (33, 48, 7):
        inputs = torch.randn(m, 64), torch.randn(48, m).to(E4M3), torch.randn(48, m).to(E4M3), s
        assert all(torch.equal(x, y) for x, y in zip(call(*inputs), transposed(*inputs), strict=True))
    assert count == 1


@pytest.mark.compiles
def test_what_is_saved_for_backward_keeps_its_layout_where_a_stride_is_symbolic() -> None:
    """The GEMMs read the result of a bmm, which backward needs."""
    head, exact = (torch.randn(48, 64, requires_grad=True) for _ in range(2))
    values = torch.randn(2, 64, 64) / 8

    def forward(x: Tensor) -> Tensor:
        h = torch.bmm(x, values)
        out: Tensor = op("mixed")(h, head.t()) * (h @ exact.t())
        return out

    call = torch.compile(forward, dynamic=True, options={"post_grad_custom_post_pass": store_once.run})
    for length in (33, 7):
        x, grad = torch.randn(2, length, 64, requires_grad=True), torch.randn(2, length, 48)
        results = [[out, *torch.autograd.grad(out, (x, head, exact), grad)] for out in (call(x), forward(x))]
        for value, reference in zip(*results, strict=True):
            torch.testing.assert_close(value, reference, rtol=1e-3, atol=1e-3)


@pytest.mark.compiles
def test_inductor_writes_the_operand_once_and_changes_no_bit() -> None:
    inputs, stores = arguments(), []

    def compiled(**options: Any) -> tuple[Tensor, ...]:
        torch._dynamo.reset()
        out, (code,) = run_and_get_code(torch.compile(lambda *args: siblings(*args)[:2], options=options), *inputs)
        stores.append(code.count("at::Float8_e4m3fn* out_ptr"))
        return out

    without, out = compiled(), compiled(post_grad_custom_post_pass=store_once.run)
    assert stores == [2, 1]
    assert all(torch.equal(x, y) for x, y in zip(out, without, strict=True))
