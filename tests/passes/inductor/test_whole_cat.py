"""whole_cat: a row that is put together and quantized is selected from padded parts, bit for bit; any other stays."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fp8fx.passes.inductor import whole_cat
from fp8fx.recipes.quantize import quantize
from fp8fx.recipes.recipe import RECIPES
from tests.support.capture import ops

aten = torch.ops.aten
SELECTED = {aten.constant_pad_nd.default, aten.where.self}


def quantized(x: Tensor, recipe: str = "rowwise") -> tuple[Tensor, ...]:
    forward = RECIPES[recipe].forward
    assert forward is not None
    data, scale = quantize(x.flatten(0, 1), forward.lhs, 1 << 20)
    assert scale is not None
    return data.float(), scale


def of_two(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return quantized(torch.cat([a, b.relu()], -1))


def of_three(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return quantized(torch.cat([a, b, a], 2))


def read_elsewhere_too(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    x = torch.cat([a, b], -1)
    return *quantized(x), x * 2


def rows_below_rows(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return quantized(torch.cat([a, a * 2], 1))


def not_quantized(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return (torch.cat([a, b], -1).relu(),)


def with_one_scale(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """Its rows are read by kernels that split them anyway."""
    return quantized(torch.cat([a, b], -1), "global")


def of_two_dtypes(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return quantized(torch.cat([a, b.double()], -1))


def with_an_empty_part(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return quantized(torch.cat([a, b[..., :0]], -1))


Function = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


def graph_of(function: Function, inputs: Sequence[Tensor], device: str = "cuda", dynamic: bool = False) -> fx.Graph:
    """As traced on a device: its nodes' values are nothing but descriptions."""
    gm = make_fx(function, tracing_mode="symbolic" if dynamic else "fake")(*inputs)
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            with value.fake_mode:  # type: ignore[attr-defined]
                node.meta["val"] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    graph: fx.Graph = gm.graph
    return graph


def run(graph: fx.Graph, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """On the CPU."""
    for node in graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cpu")}
    graph.lint()
    out: tuple[Tensor, ...] = fx.GraphModule({}, graph)(*inputs)
    return out


def inputs() -> tuple[Tensor, Tensor]:
    a, b = torch.randn(2, 3, 5), torch.randn(2, 3, 8)
    a[0, 0, 0], b[1, 1, 1], b[0, 1, 2] = -0.0, torch.inf, torch.nan
    return a.bfloat16(), b.bfloat16()


def same(x: Tensor, y: Tensor) -> bool:
    return torch.equal(x.isnan(), y.isnan()) and torch.equal(
        x.nan_to_num().view(torch.int32), y.nan_to_num().view(torch.int32)
    )


@pytest.mark.parametrize("function", [of_two, of_three, read_elsewhere_too])
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_row_is_the_same(function: Function, dynamic: bool) -> None:
    given = inputs()
    graph = graph_of(function, given, dynamic=dynamic)
    whole_cat.run(graph)
    if not dynamic:  # a symbolic last dimension is left alone
        assert aten.cat.default not in ops(graph)
        assert set(ops(graph)) >= SELECTED
        for x, y in zip(run(graph, given), function(*given), strict=True):
            assert same(x.float(), y.float())


@pytest.mark.parametrize(
    "function", [rows_below_rows, not_quantized, with_one_scale, of_two_dtypes, with_an_empty_part]
)
def test_any_other_is_left_alone(function: Function) -> None:
    graph = graph_of(function, inputs())
    before = str(graph)
    whole_cat.run(graph)
    assert str(graph) == before


def test_on_the_cpu_it_is_left_alone() -> None:
    graph = graph_of(of_two, inputs(), "cpu")
    before = str(graph)
    whole_cat.run(graph)
    assert str(graph) == before
