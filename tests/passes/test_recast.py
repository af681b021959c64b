"""recast: the partitioner keeps the FP8 tensors that backward computes in backward, so that it saves no FP8 copy of a weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition

from fp8fx.config import Config
from fp8fx.convert import rewritten
from fp8fx.passes import recast

aten, prims = torch.ops.aten, torch.ops.prims
E4M3, E5M2, BF16 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16


def tagged(*nodes: tuple[torch.dtype, str | None]) -> fx.Graph:
    """A joint graph of casts of one tensor, each to a dtype and with the partitioner's tag."""
    graph = fx.Graph()
    x = graph.placeholder("primals_1")
    x.meta["val"] = torch.empty(2, 2)
    for dtype, tag in nodes:
        cast = graph.call_function(prims.convert_element_type.default, (x, dtype))
        cast.meta = {"val": torch.empty(2, 2, dtype=dtype)} | ({} if tag is None else {"partitioner_tag": tag})
    graph.output(tuple(graph.find_nodes(op="call_function", target=prims.convert_element_type.default)))
    return graph


def tags(graph: fx.Graph) -> list[str | None]:
    return [node.meta.get("partitioner_tag") for node in graph.find_nodes(op="call_function", target=prims.convert_element_type.default)]


def test_fp8_computed_in_backward_stays_there_and_nothing_else() -> None:
    backward = [(E4M3, "is_backward"), (E5M2, "is_backward")]
    others = [(E4M3, "is_forward"), (E4M3, None), (E4M3, "must_be_in_forward"), (BF16, "is_backward")]
    graph = tagged(*backward, *others)
    recast.run(graph)
    assert tags(graph) == ["must_be_in_backward"] * 2 + [tag for _, tag in others]


def test_no_match_leaves_the_graph_unchanged() -> None:
    graph = tagged((E4M3, None), (E5M2, None), (BF16, None))
    before = str(graph)
    recast.run(graph)
    assert (str(graph), tags(graph)) == (before, [None] * 3)


def test_twice_is_once() -> None:
    graph = tagged((E4M3, "is_backward"), (BF16, "is_backward"))
    recast.run(graph)
    recast.run(graph)
    assert tags(graph) == ["must_be_in_backward", "is_backward"]


def test_what_is_no_tensor_is_passed_over() -> None:
    graph = tagged((E4M3, "is_backward"))
    (cast,) = graph.find_nodes(op="call_function", target=prims.convert_element_type.default)
    cast.meta["val"] = (torch.empty(2, 2, dtype=E4M3), 3)
    recast.run(graph)
    assert tags(graph) == ["is_backward"]


class Tied(nn.Module):
    """One weight under two linears, and a second one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(self.one(x).tanh()).tanh())


def partitioned(model: nn.Module, x: Tensor, recipe: str, joint_pass: Callable[[fx.Graph], None]) -> tuple[fx.Graph, list[Tensor]]:
    """The forward graph that the partitioner makes of the joint graph behind `joint_pass`, and the gradients."""
    graphs: list[fx.Graph] = []

    def compiler(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        graphs.append(gm.graph)
        return make_boxed_func(gm.forward)

    def partition(joint: fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        joint_pass(joint.graph)
        return min_cut_rematerialization_partition(joint, inputs, **kwargs)

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        compile = aot_autograd(fw_compiler=compiler, partition_fn=partition)
        return compile(rewritten(gm, example_inputs, Config(recipe=recipe, profit="always"))[0], example_inputs)

    torch._dynamo.reset()
    gradients = torch.autograd.grad(torch.compile(model, backend=backend)(x).square().sum(), (x, *model.parameters()))
    return graphs[0], list(gradients)


def saved_bytes_of_weights(graph: fx.Graph) -> int:
    """How much the forward graph saves of what follows from the weights alone."""
    (output,) = graph.find_nodes(op="output")
    made = {node for node in graph.find_nodes(op="placeholder") if node.meta["val"].shape[0] == node.meta["val"].shape[1]}
    for node in graph.nodes:
        if node.all_input_nodes and made.issuperset(node.all_input_nodes):
            made.add(node)
    return sum(node.meta["val"].nbytes for node in output.args[0][1:] if node in made and node.op != "placeholder")


@pytest.mark.parametrize("width", [64, 40])  # 40 is padded to 48
def test_no_fp8_weight_is_saved_and_no_bit_of_a_gradient_changes(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setattr("fp8fx.hardware.has_fp8_tensor_cores", lambda device: True)
    model, x = Tied(width), torch.randn(32, width, requires_grad=True)
    without, expected = partitioned(model, x, "global", lambda graph: None)
    graph, gradients = partitioned(model, x, "global", recast.run)
    assert saved_bytes_of_weights(without) == 2 * (width * width + 4)  # an FP8 copy and a scale
    assert saved_bytes_of_weights(graph) == 2 * 4
    assert all(torch.equal(x, y) for x, y in zip(gradients, expected, strict=True))
