"""The FX helpers: values, copies, constants, names."""

from __future__ import annotations

import copy as copying
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fp8fx.convert import convert
from fp8fx.errors import GraphError
from fp8fx.graph.constants import constants
from fp8fx.graph.copies import copy, take_over
from fp8fx.graph.names import module_path, name_of
from fp8fx.graph.propagate import propagate
from fp8fx.graph.values import UNKNOWN, attribute, fake, storage, unused, value
from fp8fx.pipeline import diff
from tests.support.capture import Capture


class Model(nn.Module):
    """A parameter, a buffer, a constant and a submodule, two levels deep."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.fc = nn.Linear(4, 4)
        self.inner.register_buffer("bias", torch.ones(4), persistent=False)
        self.w = nn.Parameter(torch.randn(4, 4))
        self.constant = torch.randn(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner.fc(x) @ self.w.t() + self.inner.bias + self.constant


def node(gm: fx.GraphModule, name: str) -> fx.Node:
    return next(n for n in gm.graph.nodes if n.name == name)


def shapes(gm: fx.GraphModule) -> dict[str, Any]:
    """The shapes of the nodes whose values are known to be tensors."""
    return {n.name: tuple(known.shape) for n in gm.graph.nodes if (known := fake(n)) is not None}


# value, fake, attribute


def test_value_and_fake() -> None:
    n = fx.Graph().placeholder("x")
    assert value(n) is UNKNOWN
    assert repr(UNKNOWN) == "?"
    assert fake(n) is None
    n.meta["example_value"] = (example := torch.ones(2))
    assert value(n) is fake(n) is example
    n.meta["val"] = 3  # export's goes before Dynamo's
    assert value(n) == 3
    assert fake(n) is None
    n.meta["val"] = None
    assert value(n) is None


def test_attribute() -> None:
    gm = fx.symbolic_trace(Model())
    assert attribute(gm, "w") is gm.w
    assert attribute(gm, "inner.fc.weight") is gm.inner.fc.weight
    with pytest.raises(AttributeError):
        attribute(gm, "inner.missing")


# copy


def test_copy_has_a_graph_of_its_own() -> None:
    gm = fx.symbolic_trace(Model())
    new = copy(gm)
    assert new.code == gm.code
    assert str(new.graph) == str(gm.graph)
    assert [n.name for n in new.graph.nodes] == [n.name for n in gm.graph.nodes]
    assert not set(new.graph.nodes) & set(gm.graph.nodes)
    new.graph.erase_node(new.graph.call_function(torch.ones, (2,)))
    node(new, "add").replace_all_uses_with(node(new, "matmul"))
    new.recompile()
    assert new.code != gm.code
    assert type(new).__name__ == type(gm).__name__ == "Model"
    x = torch.randn(2, 4)
    assert torch.equal(copy(gm)(x), gm(x))


def test_copy_keeps_every_meta() -> None:
    gm = fx.symbolic_trace(Model())
    for i, n in enumerate(gm.graph.nodes):
        n.meta["mine"] = i  # the output's too
    gm.meta["mine"] = 7
    new = copy(gm)
    assert [n.meta for n in new.graph.nodes] == [n.meta for n in gm.graph.nodes]
    assert new.meta == gm.meta
    new.graph.find_nodes(op="placeholder")[0].meta["mine"] = "changed"
    new.meta["mine"] = "changed"
    assert (gm.graph.find_nodes(op="placeholder")[0].meta["mine"], gm.meta["mine"]) == (0, 7)


def test_copy_of_an_empty_graph() -> None:
    graph = fx.Graph()
    gm = fx.GraphModule(nn.Module(), graph)  # no output at all
    assert len(copy(gm).graph.nodes) == 0


def test_copy_holds_what_the_original_holds() -> None:
    gm = torch.export.export(Model(), (torch.randn(2, 4),)).module()
    gm.inner.train(False)
    new = copy(gm)
    assert list(new.state_dict()) == list(gm.state_dict()) == ["w", "inner.fc.weight", "inner.fc.bias"]
    assert [name for name, _ in new.named_buffers()] == [name for name, _ in gm.named_buffers()] == ["inner.bias"]
    assert all(a is b for a, b in zip(new.parameters(), gm.parameters(), strict=True))
    assert new.constant is gm.constant
    assert (new.training, new.inner.training) == (gm.training, False)
    new.inner.extra = nn.Linear(1, 1)  # the containers are its own
    assert not hasattr(gm.inner, "extra")


def test_take_over_of_shared_containers() -> None:
    root, shared = nn.Module(), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    root.a, root.b, root.unused = shared, shared, nn.Linear(4, 4)
    graph = fx.Graph()
    graph.output(graph.call_module("a.0", (graph.call_module("b.1", (graph.placeholder("x"),)),)))
    gm = fx.GraphModule(root, graph)
    assert "a.1.weight" not in gm.state_dict()  # which is what it is for
    take_over(gm, root)
    assert list(gm.state_dict()) == list(root.state_dict())
    assert gm.get_submodule("a.0") is gm.get_submodule("b.0") is shared[0]
    assert gm.unused is root.unused


# propagate


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
    [(lambda: torch.autocast("cpu", torch.bfloat16), "_enter_autocast"), (torch.inference_mode, "_enter_inference_mode")],
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
    known = not (dynamo and by_another_name)  # else Dynamo has forgotten the shape before, and the linear there is left alone
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
        assert not {n.name for n in gm.graph.nodes if n.op == "call_function" and n.name.startswith("getitem")} & shapes(gm).keys()


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
        ((torch.ones(2), torch.ones(3)), r"the graph does not run on the example inputs float32\(2,\), float32\(3,\): "),
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


# constants


def test_constants_of_a_traced_module() -> None:
    gm = fx.symbolic_trace(Model())
    assert {n.target for n in constants(gm, None)} == {"w", "inner.bias", "constant"}


def test_a_submodule_is_no_constant() -> None:
    graph = fx.Graph()
    graph.output(graph.get_attr("inner"))
    gm = fx.GraphModule(Model(), graph)
    assert constants(gm, None) == set()


def test_constants_among_the_inputs() -> None:
    gm = fx.symbolic_trace(lambda x, w, b: F.linear(x, w, b))
    x, w = torch.randn(2, 4), nn.Parameter(torch.randn(4, 4))
    assert constants(gm, None) == set()
    assert {n.name for n in constants(gm, (x, w, w.detach()))} == {"w"}
    node(gm, "b").meta["val"] = w
    assert {n.name for n in constants(gm, (x,))} == {"b"}


def test_constants_of_dynamo() -> None:
    model, closed, x = Model(), torch.randn(4, 4), torch.randn(2, 4)
    capture = Capture()
    torch.compile(lambda x: model(x) @ closed @ GLOBAL, backend=capture)(x)
    gm = capture.only.before
    placeholders = gm.graph.find_nodes(op="placeholder")
    found = constants(gm, None)
    assert [n.name for n in placeholders if n not in found] == ["l_x_"]
    assert len(found) == len(placeholders) - 1 == 7


def test_constants_of_a_compiled_module() -> None:
    capture = Capture()
    torch.compile(Model(), backend=capture)(torch.randn(2, 4))
    gm = capture.only.before
    found = {name_of(n) for n in constants(gm, None)}
    assert found == {"inner.fc.weight", "inner.fc.bias", "inner.bias", "w", "constant"}
    assert len(gm.graph.find_nodes(op="placeholder")) == 6


def test_an_argument_of_a_function_is_no_constant() -> None:
    capture = Capture()
    torch.compile(lambda x, w: x @ w, backend=capture)(torch.randn(2, 4), torch.randn(4, 4))
    assert constants(capture.only.before, None) == set()


GLOBAL = torch.randn(4, 4)


# module_path, name_of


@pytest.mark.parametrize(
    ("stack", "path"),
    [
        (None, ""),
        ({}, ""),
        ({"": ("", Model)}, ""),
        ({"a": ("a", Model), "a.b": ("a.b", nn.Linear)}, "a.b"),  # symbolic_trace
        ({"L__self__": ("", "Model"), "L__self___layers_0": ("layers.0", "Linear")}, "layers.0"),  # export
        ({"x": ("L['self']._modules['layers']._modules['0']._modules['fc']", nn.Linear)}, "layers.0.fc"),  # Dynamo
        ({"x": ("L['self'].layers[0].mlp.fc", nn.Linear)}, "layers.0.mlp.fc"),
        ({"x": ("L['self']", Model)}, ""),
        ({"x": ("G['model'].encoder", Model)}, "encoder"),
        ({"x": ("L['fn'].__closure__[0].cell_contents", Model)}, "__closure__.0.cell_contents"),
    ],
    ids=str,
)
def test_module_path(stack: Any, path: str) -> None:
    n = fx.Graph().placeholder("x")
    if stack is not None:
        n.meta["nn_module_stack"] = stack
    assert module_path(n) == path


@pytest.mark.parametrize("callable_name", [False, True])  # a method up to torch 2.11
def test_name_of_dynamo_s_inputs(callable_name: bool) -> None:
    n = fx.Graph().placeholder("l_self_w_")
    assert name_of(n) == "l_self_w_"
    text = "L['self']._modules['fc']._parameters['weight']"
    n._dynamo_source = SimpleNamespace(name=(lambda: text) if callable_name else text)
    assert name_of(n) == "fc.weight"


def test_names_and_paths_are_those_of_the_model_however_it_was_traced() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)), Model()])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    model, x, capture = Outer(), torch.randn(2, 4), Capture()
    torch.compile(model, backend=capture)(x)
    expected = [("layers.0.0", "layers.0.0.weight"), ("layers.1.inner.fc", "layers.1.inner.fc.weight"), ("layers.1", "layers.1.w")]
    for report in (
        capture.only.report,
        convert(model).meta["fp8fx_report"],
        convert(torch.export.export(model, (x,))).meta["fp8fx_report"],
        convert(torch.export.export(model, (x,), strict=True)).meta["fp8fx_report"],
    ):
        assert [(row.path, row.name) for row in report.rows] == expected


# diff


def test_diff() -> None:
    assert diff(["a", "b"], ["a", "b"]) == ""
    assert diff(["a", "b", "c", "d"], ["a", "b", "x", "d"]).splitlines() == [
        "--- before",
        "+++ after",
        "@@ -2,3 +2,3 @@",
        " b",
        "-c",
        "+x",
        " d",
    ]


def test_an_unused_name() -> None:
    model = nn.Module()
    model.part, model.part_1 = nn.Module(), nn.Linear(4, 4)
    model.part.fc = nn.Linear(4, 4)
    assert [unused(model, name) for name in ("other", "part", "part.fc", "part.other")] == ["other", "part_2", "part.fc_1", "part.other"]


def test_storage_tells_what_shares_memory() -> None:
    x = torch.randn(4, 4)
    assert storage(x) == storage(x.t()[1:]) != storage(x.clone())
    assert (storage(None), storage(x.to_sparse())) == (None, None)
