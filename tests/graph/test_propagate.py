"""propagate: the shapes of a graph, from example inputs or without, computing nothing and changing nothing."""

from __future__ import annotations

import copy as copying
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fp8fx.convert import convert
from fp8fx.errors import GraphError
from fp8fx.graph.propagate import propagate
from fp8fx.graph.values import UNKNOWN, fake, value
from tests.support.capture import Capture
from tests.support.graphs import Model, node


def shapes(gm: fx.GraphModule) -> dict[str, Any]:
    """The shapes of the nodes whose values are known to be tensors."""
    return {n.name: tuple(known.shape) for n in gm.graph.nodes if (known := fake(n)) is not None}


def test_propagate_with_example_inputs() -> None:
    gm = fx.symbolic_trace(Model())
    propagate(gm, (torch.randn(2, 3, 4),))
    weights = {"w": (4, 4), "t": (4, 4), "inner_bias": (4,), "constant": (4,)}
    assert shapes(gm) == weights | dict.fromkeys(("x", "inner_fc", "matmul", "add", "add_1"), (2, 3, 4))
    assert all(isinstance(fake(n), FakeTensor) for n in gm.graph.nodes if n.op != "output")


def test_propagate_without_example_inputs() -> None:
    gm = fx.symbolic_trace(Model())
    propagate(gm, None)
    assert fake(node(gm, "x")) is fake(node(gm, "matmul")) is None
    assert tuple(fake(node(gm, "t")).shape) == (4, 4)  # type: ignore[union-attr]


def test_propagate_keeps_what_is_known() -> None:
    x = torch.randn(2, 4)
    gm = make_fx(Model())(x)
    before = [value(n) for n in gm.graph.nodes]
    propagate(gm, (x,))
    assert all(a is b for a, b in zip(before, [value(n) for n in gm.graph.nodes], strict=True))


def test_propagate_fills_in_what_is_missing() -> None:
    for mode in ("real", "fake", "symbolic"):  # the first gives every value a mode of its own
        gm = make_fx(lambda x, y: x.abs() + y.neg(), tracing_mode=mode)(torch.randn(2, 4), torch.randn(2, 4))
        old = value(node(gm, "abs_1"))
        del node(gm, "neg").meta["val"], node(gm, "add").meta["val"]
        propagate(gm, None)
        assert [tuple(map(int, fake(node(gm, name)).shape)) for name in ("neg", "add")] == [(2, 4)] * 2  # type: ignore[union-attr]
        assert value(node(gm, "abs_1")) is old


def test_propagate_takes_fake_inputs() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = torch.randn(2, 4)
    gm = fx.symbolic_trace(Model())
    propagate(gm, (x,))
    assert fake(node(gm, "x")) is x
    assert fake(node(gm, "matmul")).fake_mode is mode  # type: ignore[union-attr]


def test_propagate_computes_nothing_and_changes_nothing() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5))
    state, random = copying.deepcopy(model.state_dict()), torch.get_rng_state()
    example = torch.ones(2, 4)
    propagate(fx.symbolic_trace(model), (example,))
    assert all(torch.equal(model.state_dict()[name], x) for name, x in state.items())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(example, torch.ones(2, 4))


@pytest.mark.parametrize(
    ("context", "enter"),
    [
        (lambda: torch.autocast("cpu", torch.bfloat16), "_enter_autocast"),
        (torch.inference_mode, "_enter_inference_mode"),
    ],
    ids=["autocast", "inference_mode"],
)
def test_propagate_does_not_run_what_acts_on_the_outside(context: Callable[[], Any], enter: str) -> None:
    def function(x: Tensor) -> Tensor:
        with context():
            return x @ x

    capture = Capture()
    torch.compile(function, backend=capture)(torch.randn(4, 4))
    assert not torch.is_autocast_enabled("cpu")
    assert not torch.is_inference_mode_enabled()
    assert value(node(capture.only.before, enter)) is value(node(capture.only.after, enter)) is UNKNOWN


class Reshaping(nn.Module):
    """A linear before and one after the shape of what they read changes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(4, 5), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.contiguous() if self.training else 2 * x
        first = self.before(y)
        y.t_()
        return first, self.after(y)


@pytest.mark.parametrize("by_another_name", [False, True])
@pytest.mark.parametrize("dynamo", [False, True])
@torch.no_grad()
def test_a_shape_that_changes_in_place(dynamo: bool, by_another_name: bool) -> None:
    model = Reshaping().train(by_another_name)  # Dynamo takes a change of its input's shape only by another name
    capture = Capture()
    new = torch.compile(model, backend=capture, fullgraph=True) if dynamo else convert(model, (torch.randn(2, 4),))
    x = torch.randn(2, 4)
    found = new(x.clone())
    report = capture.only.report if dynamo else new.meta["fp8fx_report"]
    assert [(row.m, row.k, row.n, row.reason) for row in report.rows][-1:] == [("4", "2", "3", None)]
    op, y = torch.ops.fp8fx.matmul_fp8_mixed, x if by_another_name else 2 * x
    known = not (
        dynamo and by_another_name
    )  # else Dynamo has forgotten the shape before, and the linear there is left alone
    assert len(report.rewritten) == 1 + known
    before = op(y, model.before.weight.t(), bias=model.before.bias) if known else model.before(y)
    assert all(map(torch.equal, found, (before, op(y.t(), model.after.weight.t(), bias=model.after.bias))))


def test_the_value_before_a_shape_changes_serves_in_grad_mode() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        y = x @ w
        y.t_()
        return y

    gm = fx.symbolic_trace(function)
    propagate(gm, (torch.randn(3, 4), nn.Parameter(torch.randn(4, 5))))
    known = value(node(gm, "matmul"))
    assert known.requires_grad
    assert known.shape == (3, 5)
    assert known.reshape(-1).shape == (15,)


def test_a_shape_that_autograd_lets_nobody_change_in_place() -> None:
    def function(x: Tensor) -> Tensor:
        y = x.chunk(2)[0]
        y.t_()
        return y + 1

    gm, x = fx.symbolic_trace(function), torch.randn(4, 4)
    propagate(gm, (x.clone().requires_grad_(),))
    assert value(node(gm, "add")) is UNKNOWN
    assert gm(x).shape == (4, 2)


def test_propagate_leaves_out_what_depends_on_data() -> None:
    gm = fx.symbolic_trace(lambda x: (x[x > 0], x.nonzero(), x.sum().item() + 1, x + 1))
    propagate(gm, (torch.randn(2, 4),))
    known = shapes(gm)
    assert {name: known[name] for name in ("x", "gt", "add_1")} == {"x": (2, 4), "gt": (2, 4), "add_1": (2, 4)}
    assert not known.keys() & {"getitem", "nonzero"}
    assert value(node(gm, "item")) is value(node(gm, "add")) is UNKNOWN


@torch.library.custom_op("fp8fx_test::opaque", mutates_args=())
def opaque(x: Tensor) -> Tensor:
    """An op that says nothing about its output."""
    return x.clone()


@pytest.mark.parametrize("given", [None, (torch.randn(2, 4),)], ids=["", "example inputs"])
def test_propagate_leaves_out_an_op_without_a_fake_implementation(given: Any) -> None:
    class Opaque(Model):
        def forward(self, x: Tensor) -> Tensor:
            return opaque(x @ self.w) @ opaque(self.w)

    gm = fx.symbolic_trace(Opaque())
    propagate(gm, given)
    assert shapes(gm) == {"w": (4, 4)} | ({} if given is None else {"x": (2, 4), "matmul": (2, 4)})


def test_propagate_without_example_inputs_never_fails() -> None:
    class Fails(Model):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.w.view(3)

    gm = fx.symbolic_trace(Fails())
    propagate(gm, None)
    assert shapes(gm) == {"w": (4, 4)}
    with pytest.raises(GraphError, match="does not run on the example inputs"):
        propagate(gm, (torch.randn(2, 4),))


def test_propagate_of_defaults_and_stars() -> None:
    def function(x: Tensor, scale: float = 2.0, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return x * scale + args[0] + kwargs["y"]

    for given in (None, [torch.ones(2)], [torch.ones(2), 3.0]):
        gm = fx.symbolic_trace(function)
        propagate(gm, given)
        assert value(node(gm, "scale")) == (3.0 if given is not None and len(given) == 2 else UNKNOWN)
        assert (
            not {n.name for n in gm.graph.nodes if n.op == "call_function" and n.name.startswith("getitem")}
            & shapes(gm).keys()
        )


def test_propagate_of_what_is_no_tensor() -> None:
    gm = fx.symbolic_trace(lambda x: (x.size(0), x.shape, x.chunk(2)))
    propagate(gm, (torch.randn(2, 4),))
    assert value(node(gm, "size")) == 2
    assert tuple(value(node(gm, "getattr_1"))) == (2, 4)
    assert [tuple(part.shape) for part in value(node(gm, "chunk"))] == [(1, 4), (1, 4)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((), r"got 0 example inputs for a graph of 2 inputs \(x, y\); pass one for each, in order"),
        ((1,), "got 1 example inputs"),
        ((1, 2, 3), "got 3 example inputs"),
        (
            (torch.ones(2), torch.ones(3)),
            r"the graph does not run on the example inputs float32\(2,\), float32\(3,\): ",
        ),
        ((torch.ones(2), "a"), r"does not run on the example inputs float32\(2,\), 'a': "),
    ],
    ids=["none", "one", "three", "shapes", "types"],
)
def test_example_inputs_that_do_not_fit(given: Any, message: str) -> None:
    gm = fx.symbolic_trace(lambda x, y: (x + y) * 2)
    with pytest.raises(GraphError, match=message):
        propagate(gm, given)


def test_example_inputs_may_leave_out_defaults() -> None:
    def function(x: Tensor, y: int = 1, z: int = 2) -> Tensor:
        return x * y + z

    for given in ([torch.ones(2)], [torch.ones(2), 1], [torch.ones(2), 1, 2]):
        propagate(fx.symbolic_trace(function), given)
    with pytest.raises(GraphError, match="got 4 example inputs for a graph of 3 inputs"):
        propagate(fx.symbolic_trace(function), [torch.ones(2), 1, 2, 3])


def test_an_input_behind_one_that_is_known_gets_its_own() -> None:
    gm = fx.symbolic_trace(lambda a, b, c: a.sum() + b.t() + c.sum())
    inputs = [torch.randn(2), torch.randn(3, 4), torch.randn(5, 6, 7)]
    a, b, c = gm.graph.find_nodes(op="placeholder")
    a.meta["example_value"] = inputs[0]
    propagate(gm, inputs)
    assert [fake(node).shape for node in (a, b, c)] == [x.shape for x in inputs]
