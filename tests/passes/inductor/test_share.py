"""share: a graph quantizes once what two linears share; of a training graph nothing else changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from fp8fx.config import Config
from fp8fx.convert import rewritten
from fp8fx.passes.inductor import share
from fp8fx.recipes.formats import E4M3, E5M2
from fp8fx.recipes.quantize import quantize
from fp8fx.recipes.recipe import RECIPES, Cast
from tests.support.capture import ops

aten = torch.ops.aten


class Heads(nn.Module):
    """Three linears on one input, and one on the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.out = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.q(x) + self.k(x) + self.v(x))


def ahead_of_time(
    model: nn.Module, x: Tensor, recipe: str
) -> tuple[list[tuple[fx.GraphModule, tuple[Any, ...]]], Tensor]:
    """The graphs that Inductor would get, forward and then backward, each with what it is called with; and the
    output."""
    graphs: list[tuple[fx.GraphModule, tuple[Any, ...]]] = []

    def compiler(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        def call(*args: Any) -> Any:
            graphs.append((gm, args))
            return gm(*args)

        return make_boxed_func(call)

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        compile = aot_autograd(
            fw_compiler=compiler, partition_fn=min_cut_rematerialization_partition
        )  # as Inductor does
        return compile(rewritten(gm, example_inputs, Config(recipe=recipe))[0], example_inputs)

    out = torch.compile(model, backend=backend)(x)
    if out.requires_grad:
        out.sum().backward()
    return graphs, out


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_shared_input_is_quantized_once(recipe: str) -> None:
    model, x = Heads(), torch.randn(4, 16)
    with torch.no_grad():
        ((gm, inputs),), out = ahead_of_time(model, x, recipe)
    assert ops(gm.graph)[aten.amax.default] == 8  # an input and a weight for each linear
    share.run(gm.graph)
    assert ops(gm.graph)[aten.amax.default] == 6  # four weights, x, and the input of `out`
    gm.graph.lint()
    assert torch.equal(gm(*inputs)[0], out)


def test_what_else_a_joint_graph_computes_twice_is_left_alone() -> None:
    graph = fx.Graph()
    primals, tangents = graph.placeholder("primals_1"), graph.placeholder("tangents_1")
    twice = [graph.call_function(aten.abs.default, (primals,)) for _ in range(2)]
    graph.output((graph.call_function(aten.add.Tensor, tuple(twice)), tangents))
    gm = fx.GraphModule(nn.Module(), graph)
    before = gm.code
    share.run(gm.graph)
    assert gm.code == before


def joint(function: Callable[..., Any]) -> fx.GraphModule:
    """The graph of a function of (4, 8) as a joint graph of training, in the operators that Inductor's passes see."""
    gm = make_fx(function, decomposition_table=select_decomp_table())(torch.randn(4, 8))
    with gm.graph.inserting_before(next(iter(gm.graph.nodes))):
        gm.graph.placeholder("tangents_1")
    return gm


@pytest.mark.parametrize("cast", [Cast(E4M3, "tensor"), Cast(E4M3, "row"), Cast(E5M2, "tensor")], ids=str)
def test_a_joint_graph_quantizes_once(cast: Cast) -> None:
    def twice(x: Tensor) -> list[Tensor]:
        return [*quantize(x.view(2, 16), cast, 64), *quantize(x.view(2, 16), cast, 64)]

    gm = joint(twice)
    assert (ops(gm.graph)[aten.amax.default], ops(gm.graph)[aten.view.default]) == (2, 2)
    share.run(gm.graph)
    gm.graph.lint()
    assert (ops(gm.graph)[aten.amax.default], ops(gm.graph)[aten.view.default]) == (1, 1)
    gm.recompile()
    x = torch.randn(4, 8)
    for value, expected in zip(gm(None, x), twice(x), strict=True):
        assert torch.equal(value, expected)


def test_a_joint_graph_keeps_what_is_computed_anew_and_other_quantizations() -> None:
    rows, whole = Cast(E4M3, "row"), Cast(E4M3, "tensor")
    gm = joint(lambda x: [*quantize(x, rows, 64), *quantize(x, rows, 64), *quantize(x, whole, 64)])
    second = gm.graph.find_nodes(op="call_function", target=aten.abs.default)[1]
    second.meta["partitioner_tag"] = "is_backward"
    share.run(gm.graph)
    assert ops(gm.graph)[aten.amax.default] == 3


def test_two_outputs_of_a_joint_graph_stay_two() -> None:
    """The caller may write to one of them."""
    cast = Cast(E4M3, "tensor")

    def doubled(x: Tensor) -> list[Tensor]:
        y, z = x * 2, x * 2
        return [y, z.view(-1), *quantize(y, cast, 64), *quantize(z, cast, 64)]

    gm = joint(doubled)
    share.run(gm.graph)
    gm.recompile()
    x = torch.randn(4, 8)
    y, z, *_ = gm(None, x)
    y.add_(100)
    assert torch.equal(z, (x * 2).view(-1))


def test_the_same_graph_without_tangents_is_not() -> None:
    gm = make_fx(lambda x: (x.abs() + 1, x.abs() + 2))(torch.randn(3))
    share.run(gm.graph)
    assert ops(gm.graph) == {aten.abs.default: 1, aten.add.Tensor: 2}
    x = torch.randn(3)
    assert all(torch.equal(y, x.abs() + i) for y, i in zip(gm(x), (1, 2), strict=True))


def test_chain() -> None:
    """What becomes equal only once its operands are one is eliminated too."""
    gm = make_fx(lambda x: x.abs().amax() + x.abs().amax())(torch.randn(3))
    share.run(gm.graph)
    assert ops(gm.graph) == {aten.abs.default: 1, aten.amax.default: 1, aten.add.Tensor: 1}


def test_nothing_equal_leaves_the_graph_unchanged() -> None:
    gm = make_fx(lambda x: x.abs() + x.neg())(torch.randn(3))
    before = gm.code
    share.run(gm.graph)
    assert gm.code == before


def test_random_numbers_and_other_arguments_are_not_equal() -> None:
    gm = make_fx(lambda x: (torch.rand_like(x), torch.rand_like(x), x.amax(0), x.amax(1)))(torch.randn(3, 3))
    share.run(gm.graph)
    assert ops(gm.graph) == {aten.rand_like.default: 2, aten.amax.default: 2}


def test_a_graph_without_a_module_is_left_alone() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(
        graph.call_function(aten.add.Tensor, tuple(graph.call_function(aten.abs.default, (x,)) for _ in range(2)))
    )
    share.run(graph)
    assert ops(graph)[aten.abs.default] == 2


def test_training_shares_without_this_pass() -> None:
    ((forward, _), _), _ = ahead_of_time(Heads(), torch.randn(4, 16), "mixed")
    assert ops(forward.graph)[aten.amax.default] == 6
