"""Calls of modules: hooks, forwards of their own, parametrizations, subclasses, and calls written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fp8fx.convert import convert
from fp8fx.linears.matches import Refusal
from fp8fx.linears.recognise import match_node
from fp8fx.linears.site import NodeKinds
from fp8fx.reasons import CallReason
from tests.support.capture import Capture
from tests.support.refusals import COMPUTED, Model, Scaled, only_refusal

HOOKS = "the module has hooks"

aten = torch.ops.aten


@pytest.mark.parametrize(
    "hook",
    [
        lambda m: m.register_forward_hook(lambda *_: None),
        lambda m: m.register_forward_pre_hook(lambda *_: None),
        lambda m: m.register_full_backward_hook(lambda *_: None),
        lambda m: m.register_full_backward_pre_hook(lambda *_: None),
    ],
    ids=["forward", "forward_pre", "backward", "backward_pre"],
)
def test_a_module_with_hooks(hook: Callable[[nn.Module], Any]) -> None:
    model = Model(lambda p, x: p.fc(x))
    handle = hook(model.fc)
    gm = fx.symbolic_trace(model)
    row = only_refusal(convert(gm), gm)
    assert (row.reason, row.path, row.form) == (HOOKS, "fc", "Linear")
    handle.remove()
    assert convert(gm).meta["fp8fx_report"].rewritten


def calling(module: nn.Module, *args: Any) -> fx.GraphModule:
    """A graph that calls `module` as a whole, whatever symbolic_trace would look into."""
    root = nn.Module()
    root.fc = module
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_module("fc", args or (x,)))
    return fx.GraphModule(root, graph)


def test_a_subclass_with_a_forward_of_its_own() -> None:
    gm, x = calling(module := Scaled(8, 8)), torch.randn(4, 8)
    row = only_refusal(new := convert(gm), gm)
    assert (row.form, row.reason) == ("Scaled", "Scaled has a forward of its own")
    assert torch.equal(new(x), module(x))


def test_a_forward_put_on_the_instance() -> None:
    model, x = Model(lambda p, x: p.fc(x)), torch.randn(4, 8)
    plain = model.fc.forward
    model.fc.forward = lambda x: 2 * plain(x)  # type: ignore[method-assign]
    gm = fx.symbolic_trace(model)
    assert only_refusal(new := convert(gm), gm).reason == "Linear has a forward of its own"
    assert torch.equal(new(x), model(x))


def test_a_parametrized_weight() -> None:
    model, x = Model(lambda p, x: p.fc(x)), torch.randn(4, 8)
    nn.utils.parametrizations.orthogonal(model.fc)
    gm = fx.symbolic_trace(model)
    new = convert(gm)
    assert only_refusal(new, gm).reason == COMPUTED
    assert torch.equal(new(x), model(x))
    assert model.state_dict().keys() >= new.state_dict().keys() == gm.state_dict().keys()


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    "norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm], ids=["hook", "parametrization"]
)
def test_a_normalized_weight(norm: Callable[[nn.Module], nn.Module], trained: bool) -> None:
    """Its linear is left alone, and stays exact; the next one is not."""
    norm(first := nn.Linear(8, 8))
    model, x = nn.Sequential(first, nn.Linear(8, 6)), torch.randn(4, 8, requires_grad=trained)
    inputs = [x, *model.parameters()]

    class ByHand(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.fp8fx.matmul_fp8_mixed(model[0](x), model[1].weight.t(), bias=model[1].bias)

    by_hand, capture = ByHand(), Capture()
    with torch.set_grad_enabled(trained):
        for call, report in (
            (new := convert(model), new.meta["fp8fx_report"]),
            (new := convert(torch.export.export(model, (x,))), new.meta["fp8fx_report"]),
            (torch.compile(model, backend=capture), None),
        ):
            out, expected = call(x), by_hand(x)
            assert torch.equal(out, expected)
            assert [row.reason for row in (report or capture.only.report).rows] == [COMPUTED, None]
            if trained:
                for a, b in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (out, expected)), strict=True):
                    torch.testing.assert_close(a, b)


def test_a_subclass_with_linears_own_forward_is_a_linear() -> None:
    class Named(nn.Linear):
        pass

    (row,) = convert(calling(Named(8, 8))).meta["fp8fx_report"].rows
    assert (row.form, row.reason) == ("Named", None)


@pytest.mark.parametrize(
    ("target", "args", "kwargs", "reason"),
    [
        (torch.matmul, ("x", 3.0), {}, "an operand is not computed in the graph"),
        (F.linear, ("x",), {}, "an operand is not computed in the graph"),
        (torch.addmm, (1.0, "x", "w"), {}, "the addend is not computed in the graph"),
        (torch.matmul, ("x", "w", None), {}, "called with other arguments than input, mat2"),
        (F.linear, ("x", "w"), {"scale": 2}, "called with other arguments than input, weight, bias"),
        (
            aten.addmm.default,
            ("x", "x", "w"),
            {"out_dtype": torch.float32},
            "called with other arguments than input, mat1, mat2, beta, alpha",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),  # an address would be another one in each process
)
def test_a_call_written_by_hand(
    target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], reason: str
) -> None:
    graph = fx.Graph()
    nodes = {"x": graph.placeholder("x"), "w": graph.get_attr("w")}
    graph.output(graph.call_function(target, tuple(nodes.get(a, a) for a in args), kwargs))
    gm = fx.GraphModule(Model(lambda p, x: x), graph)
    assert only_refusal(convert(gm), gm).reason == reason


def test_a_module_called_with_a_literal() -> None:
    gm = calling(nn.Linear(8, 8), 1.0)
    (node,) = gm.graph.find_nodes(op="call_module", target="fc")
    found = match_node(node, gm, NodeKinds(constants=frozenset()))
    assert isinstance(found, Refusal)
    assert found.reason == CallReason.INPUT_NOT_IN_GRAPH()
