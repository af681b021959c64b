"""The pattern that Inductor's passes look for is what `quantize` emits, for every cast of every recipe."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, fx
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from fp8fx.ops.operands import DTYPES
from fp8fx.recipes import pattern
from fp8fx.recipes.quantize import quantize
from fp8fx.recipes.recipe import GEMMS, RECIPES, Cast

aten, prims = torch.ops.aten, torch.ops.prims

CASTS = dict.fromkeys(
    cast
    for recipe in RECIPES.values()
    for name in GEMMS
    if (gemm := getattr(recipe, name)) is not None
    for cast in (gemm.lhs, gemm.rhs)
)
BLOCK = 64  # of one row here, but for the test of several

casts = pytest.mark.parametrize(
    "cast", CASTS, ids=lambda cast: f"{cast.format.name} {cast.format.target:g} {cast.granularity}"
)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def emitted(cast: Cast, dtype: torch.dtype, features: int = BLOCK, *, given: bool = False) -> fx.Graph:
    """What `quantize` is by Inductor's decompositions; x is no input of the graph but computed, by tanh."""

    def quantized(x: Tensor, *scale: Tensor) -> tuple[Tensor, Tensor]:
        data, found = quantize(x.tanh(), cast, BLOCK, *scale)
        assert found is not None
        return data, found

    scale = [torch.tensor(0.5)] if given else []
    graph = make_fx(quantized, decomposition_table=select_decomp_table())(
        torch.randn(8, features).to(dtype), *scale
    ).graph
    graph.eliminate_dead_code()
    return graph


def only(nodes: list[fx.Node]) -> fx.Node:
    (node,) = nodes
    return node


def x_of(graph: fx.Graph) -> fx.Node:
    return only(graph.find_nodes(op="call_function", target=aten.tanh.default))


def data_of(graph: fx.Graph) -> fx.Node:
    data = graph.output_node().args[0][0]  # type: ignore[index]
    assert isinstance(data, fx.Node)
    return data


@dtypes
@casts
def test_every_step_is_found_and_nothing_else(cast: Cast, dtype: torch.dtype) -> None:
    graph = emitted(cast, dtype)
    computed = {node for node in graph.nodes if node.op == "call_function"}
    assert pattern.quantizations(graph) == computed - {x_of(graph)}


@dtypes
@casts
def test_the_operand_was_cast_from_x(cast: Cast, dtype: torch.dtype) -> None:
    graph = emitted(cast, dtype)
    data = data_of(graph)
    assert data.meta["val"].dtype in pattern.FP8_DTYPES
    assert pattern.cast_from(data) is x_of(graph)
    assert pattern.cast_from(x_of(graph)) is None
    with graph.inserting_after(data):
        transposed = graph.call_function(aten.t.default, (data,))
    assert pattern.cast_from(transposed) is x_of(graph)


@dtypes
@casts
def test_one_step_begins_the_cast(cast: Cast, dtype: torch.dtype) -> None:
    graph = emitted(cast, dtype)
    first = only([node for node in pattern.readers(x_of(graph)) if pattern.begins_cast(node)])
    assert first.target is (aten.mul.Tensor if dtype == torch.float32 else prims.convert_element_type.default)


@dtypes
@casts
def test_a_tensor_s_amax_is_found(cast: Cast, dtype: torch.dtype) -> None:
    graph = emitted(cast, dtype)
    found = [magnitudes for node in graph.nodes if (magnitudes := pattern.amax_of_tensor(node)) is not None]
    assert [pattern.behind_views(node.args[0]) for node in found] == [x_of(graph)] * (cast.granularity == "tensor")


@pytest.mark.parametrize(
    ("cast", "given"),
    [
        *(pytest.param(cast, False, id=f"{cast}") for cast in CASTS),
        *(pytest.param(cast, True, id=f"{cast}, scale given") for cast in CASTS if cast.granularity == "tensor"),
    ],
)
@dtypes
def test_the_inverse_of_a_tensor_s_scale_is_found_and_where_its_x_lies(
    cast: Cast, dtype: torch.dtype, given: bool
) -> None:
    graph = emitted(cast, dtype, given=given)
    inverses = pattern.inverses_of_scales(graph)
    assert len(inverses) == (cast.granularity == "tensor")
    for inverse in inverses:
        (reader,) = inverse.users
        assert not pattern.casts_stored(reader)
        x_of(graph).replace_all_uses_with(graph.find_nodes(op="placeholder")[0])
        assert pattern.casts_stored(reader)


@pytest.mark.parametrize("features", [3 * BLOCK, 3 * BLOCK - 1])
@pytest.mark.parametrize("cast", [cast for cast in CASTS if cast.granularity == "block"], ids=str)
def test_of_several_blocks_a_row_the_cast_is_found(cast: Cast, features: int) -> None:
    """Its scale and its x are not: a pad, a slice or a further dimension stands in between, and none is a view here."""
    graph = emitted(cast, torch.bfloat16, features)
    x8 = data_of(graph).args[0]  # behind the slice
    padded = only(graph.find_nodes(op="call_function", target=aten.constant_pad_nd.default))
    assert pattern.cast_from(x8) is padded
    assert only([node for node in pattern.readers(padded) if pattern.begins_cast(node)])
    found = Counter(node.target for node in pattern.quantizations(graph))
    assert (found[aten.reciprocal.default], found[aten.mul.Tensor], found[aten.amax.default]) == (1, 1, 0)


def test_what_is_no_quantization_is_not_found() -> None:
    def other(x: Tensor) -> tuple[Tensor, ...]:
        return (
            x.half() * 2,
            (x * 2).half(),
            x.amax(),
            x.abs().amax(0),
            x.amax().double().sqrt().float(),
            x.abs().sum().reciprocal(),
        )

    graph = make_fx(other, decomposition_table=select_decomp_table())(torch.randn(4, 8)).graph
    assert pattern.quantizations(graph) == set()
    assert pattern.inverses_of_scales(graph) == []
    for node in graph.nodes:
        assert not pattern.begins_cast(node)
        assert pattern.amax_of_tensor(node) is None
        assert pattern.cast_from(node) is None


def test_views_are_looked_through() -> None:
    graph = make_fx(lambda x: x.view(4, 16).permute(1, 0).t().clone().tanh())(torch.randn(8, 8)).graph
    x = only(graph.find_nodes(op="placeholder"))
    copy = only(graph.find_nodes(op="call_function", target=aten.clone.default)[-1:])
    assert pattern.behind_views_and_copies(copy) is x
    assert pattern.behind_views(copy) is copy
    assert pattern.behind_views("no node") == "no node"
