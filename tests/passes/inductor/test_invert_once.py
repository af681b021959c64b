"""invert_once: the reciprocal of a tensor's scale is stored; those of rows, and those that Inductor is not to store,
are left alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

from fp8fx.passes.inductor import invert_once
from tests.support.capture import ops

aten, prims = torch.ops.aten, torch.ops.prims
E4M3 = torch.float8_e4m3fn
STORE = aten.as_strided.default


def inverse(scale: Tensor) -> Tensor:
    """As the ops decompose."""
    inverse: Tensor = prims.convert_element_type(
        prims.convert_element_type(scale, torch.float64).reciprocal(), torch.float32
    )
    return inverse


def cast(x: Tensor, r: Tensor) -> Tensor:
    cast: Tensor = prims.convert_element_type(x * r, E4M3)
    return cast


def two_layouts(x: Tensor) -> tuple[Tensor, ...]:
    y = x.tanh()
    r = inverse(y.abs().amax())
    return cast(y, r), cast(y.t(), r).contiguous(), r


def two_tensors(x: Tensor) -> tuple[Tensor, ...]:
    y, z = x.tanh(), x.exp()
    return cast(y, inverse(y.abs().amax())), cast(z, inverse(z.abs().amax()))


def rowwise(x: Tensor) -> tuple[Tensor, ...]:
    y = x.tanh()
    return (cast(y, inverse(y.abs().amax(-1, keepdim=True))),)


def one_row(x: Tensor) -> tuple[Tensor, ...]:
    """A scale of one element that is not a number: the shape tells, not the count."""
    y = x[:1].tanh()
    return (cast(y, inverse(y.abs().amax(-1, keepdim=True))),)


def users_own(x: Tensor) -> tuple[Tensor, ...]:
    """A reciprocal that no float32 cast follows, and a cast of something else."""
    y = x.tanh()
    return y * y.amax().reciprocal(), cast(y, prims.convert_element_type(y.amax().double().sqrt(), torch.float32))


Function = Callable[[Tensor], tuple[Tensor, ...]]


@pytest.mark.parametrize(("function", "count"), [(two_layouts, 1), (two_tensors, 2)])
def test_each_reciprocal_is_stored_once(function: Function, count: int) -> None:
    x = torch.randn(4, 6)
    gm, before = make_fx(function)(x), make_fx(function)(x)
    invert_once.run(gm.graph)
    gm.graph.lint()
    assert ops(gm.graph) == ops(before.graph) + Counter({STORE: count})
    for store in gm.graph.find_nodes(op="call_function", target=STORE):
        assert list(store.args[0].users) == [store]  # every cast reads the store
        assert (store.args[1:], store.meta["val"].shape) == (([], []), ())
    gm.recompile()
    assert all(torch.equal(x, y) for x, y in zip(gm(x), function(x), strict=True))


@pytest.mark.parametrize("function", [rowwise, one_row, users_own])
def test_no_match_leaves_the_graph_unchanged(function: Function) -> None:
    gm = make_fx(function)(torch.randn(4, 6))
    before = str(gm.graph)
    invert_once.run(gm.graph)
    assert str(gm.graph) == before


def test_twice_changes_no_bit() -> None:
    x = torch.randn(4, 6)
    gm = make_fx(two_layouts)(x)
    invert_once.run(gm.graph)
    invert_once.run(gm.graph)
    gm.graph.lint()
    gm.recompile()
    assert all(torch.equal(x, y) for x, y in zip(gm(x), two_layouts(x), strict=True))


@pytest.mark.compiles
def test_inductor_divides_once_and_changes_no_bit() -> None:
    x, divisions = torch.randn(32, 64), []

    def compiled(**options: Any) -> tuple[Tensor, ...]:
        torch._dynamo.reset()
        out, (code,) = run_and_get_code(torch.compile(lambda x: two_layouts(x)[:2], options=options), x)
        divisions.append(len(re.findall(r"tmp\d+ / tmp\d+", code)))
        return out

    without, out = compiled(), compiled(post_grad_custom_post_pass=invert_once.run)
    assert divisions == [2, 1]
    assert all(torch.equal(x, y) for x, y in zip(out, without, strict=True))
