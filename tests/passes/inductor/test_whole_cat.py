"""whole_cat: a row that is put together and quantized is selected from padded parts, bit for bit; any other stays."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, export

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


class _Module(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return self.function(a, b)


def graph_of(
    function: Function, inputs: Sequence[Tensor], device: str = "cuda", dynamic: int | None = None
) -> fx.Graph:
    """As traced on a device: its nodes' values are nothing but descriptions. A `dynamic` dimension is symbolic."""
    sizes = None if dynamic is None else {name: {dynamic: Dim.AUTO} for name in ("a", "b")}
    graph = export(_Module(function), tuple(inputs), dynamic_shapes=sizes).run_decompositions().graph
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            with value.fake_mode:  # type: ignore[attr-defined]
                node.meta["val"] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
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
@pytest.mark.parametrize("dynamic", [None, 1], ids=["", "any number of rows"])
def test_the_row_is_the_same(function: Function, dynamic: int | None) -> None:
    given = inputs()
    graph = graph_of(function, given, dynamic=dynamic)
    whole_cat.run(graph)
    assert aten.cat.default not in ops(graph)
    assert set(ops(graph)) >= SELECTED
    for x, y in zip(run(graph, given), function(*given), strict=True):
        assert same(x.float(), y.float())


def test_any_number_of_features_is_left_alone() -> None:
    graph = graph_of(of_two, inputs(), dynamic=2)
    before = str(graph)
    whole_cat.run(graph)
    assert str(graph) == before


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
