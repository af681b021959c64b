"""sines_once: a table that larger tensors read is written once; what nothing larger reads is left alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

from fp8fx.passes.inductor import sines_once
from fp8fx.torch_internals import REALIZE

Function = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


def rotary(q: Tensor, f: Tensor) -> tuple[Tensor, ...]:
    """(B, H, S, D) and (S, D)."""
    tables = (torch.ops.prims.convert_element_type(g(f) * 0.5, torch.bfloat16) for g in (torch.cos, torch.sin))
    cos, sin = (table.unsqueeze(0) for table in tables)
    return q * cos + q.flip(-1) * sin, q * sin


def without_a_step(q: Tensor, f: Tensor) -> tuple[Tensor, ...]:
    return q * f.cos(), q + f.sin()


def as_large_as_its_reader(q: Tensor, f: Tensor) -> tuple[Tensor, ...]:
    return (q * q.cos(),)


def alone(q: Tensor, f: Tensor) -> tuple[Tensor, ...]:
    return f.cos(), f.sin().sum()


def concatenated(q: Tensor, f: Tensor) -> tuple[Tensor, ...]:
    """As encodings of time steps are: nothing is computed twice."""
    return (torch.cat([f, f.cos(), f.sin()], -1),)


def combined(q: Tensor, f: Tensor) -> tuple[Tensor, ...]:
    """The table is what is computed of the cosines alone; their product with another tensor is not."""
    return (q * (f.cos() * f),)


def arguments() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 4, 8, 16).bfloat16(), torch.randn(8, 16)


def marked(function: Function) -> list[fx.Node]:
    gm = make_fx(function)(*arguments())
    before = str(gm.graph)
    sines_once.run(gm.graph)
    assert str(gm.graph) == before
    return [node for node in gm.graph.nodes if node.meta.get(REALIZE)]


@pytest.mark.parametrize(("function", "dtype"), [(rotary, torch.bfloat16), (without_a_step, torch.float32)])
def test_a_table_is_marked_at_its_end(function: Function, dtype: torch.dtype) -> None:
    found = marked(function)
    assert [(node.meta["val"].shape, node.meta["val"].dtype) for node in found] == [((8, 16), dtype)] * 2


@pytest.mark.parametrize("function", [as_large_as_its_reader, alone, combined, concatenated])
def test_anything_else_is_left_alone(function: Function) -> None:
    assert marked(function) == []


@pytest.mark.compiles
@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_writes_the_table_and_rounds_it_as_eager_does(dynamic: bool) -> None:
    inputs, tables, errors = arguments(), [], []
    exact = rotary(*inputs)
    for options in ({}, {"post_grad_custom_post_pass": sines_once.run}):
        torch._dynamo.reset()
        call = torch.compile(rotary, dynamic=dynamic, options=options)
        out, (code,) = run_and_get_code(call, *inputs)
        tables.append(code.count("empty_strided_cpu((8, 16)") + code.count("empty_strided_cpu((s"))
        errors.append(max(float((x.float() - y.float()).abs().max()) for x, y in zip(out, exact, strict=True)))
    assert tables[1] == tables[0] + 2
    assert errors[1] <= errors[0]
