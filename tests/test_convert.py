"""convert: any graph in, the same module with FP8 linears out, which can do what the module could."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import fp8fx
from fp8fx.convert import convert
from fp8fx.graph.names import module_path
from fp8fx.recipes.quantize import sqnr
from tests.support.capture import Capture, assert_same_graph, ops
from tests.support.mlp import MLP, example, mixed

aten = torch.ops.aten


def dynamo(model: nn.Module, x: Tensor) -> Any:
    """The graph that Dynamo gives a backend, as a function of x alone."""
    torch.compile(model, backend=(capture := Capture()))(x)
    before, after = capture.only.before, capture.only.after
    assert before is not after
    names = {"w": model.w, "weight": model.fc.weight, "bias": model.fc.bias, "scale": model.scale, "shift": model.shift}
    placeholders = [n.target for n in before.graph.find_nodes(op="placeholder")]
    values = [next((v for name, v in names.items() if p.rstrip("_").endswith(f"_{name}")), None) for p in placeholders]
    return lambda x: after(*(x if v is None else v for v in values))[0]


# How each kind of graph is made, and converted.
SOURCES: dict[str, Callable[[MLP, Tensor], Any]] = {
    "nn.Module": lambda model, x: convert(model),
    "symbolic_trace": lambda model, x: convert(fx.symbolic_trace(model)),
    "ExportedProgram": lambda model, x: convert(torch.export.export(model, (x,))),
    "ep.module()": lambda model, x: convert(torch.export.export(model, (x,)).module()),
    "strict export": lambda model, x: convert(torch.export.export(model, (x,), strict=True)),
    "decompositions": lambda model, x: convert(torch.export.export(model, (x,)).run_decompositions()),
    "make_fx": lambda model, x: convert(make_fx(model)(x)),
    "Dynamo": dynamo,
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("shape", [(4, 16), (2, 3, 16)], ids=str)
def test_every_kind_of_graph_computes_what_is_written_by_hand(source: str, shape: tuple[int, ...]) -> None:
    model, x = MLP(), torch.randn(shape)
    new = SOURCES[source](model, x)
    assert torch.equal(new(x), model.by_hand(x))


@pytest.mark.parametrize("source", ["nn.Module", "symbolic_trace", "ExportedProgram", "ep.module()"])
def test_gradients_reach_the_original_parameters(source: str) -> None:
    model, x = MLP(), example()
    model.by_hand(x).square().sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    SOURCES[source](model, x)(x).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert torch.equal(p.grad, expected[name]), name


@pytest.mark.parametrize("source", ["nn.Module", "symbolic_trace", "ExportedProgram", "ep.module()"])
def test_parameters_and_buffers_are_shared(source: str) -> None:
    model = MLP()
    new = SOURCES[source](model, example())
    for name, p in model.named_parameters():
        assert new.get_parameter(name) is p
    for name, b in model.named_buffers():
        assert new.get_buffer(name).data_ptr() == b.data_ptr()
    x = example()
    with torch.no_grad():
        model.fc.weight.mul_(2)
    assert torch.equal(new(x), model.by_hand(x))


def test_the_state_dict_is_the_same() -> None:
    model, x = MLP(), example()
    model.spare = nn.Linear(2, 2)  # not used in the graph
    for old in (model, fx.symbolic_trace(model), torch.export.export(model, (x,)).module()):
        new = convert(old)
        assert list(new.state_dict()) == list(old.state_dict())
        assert [name for name, _ in new.named_buffers()] == [name for name, _ in old.named_buffers()]
    assert "shift" not in convert(model).state_dict()


def test_load_state_dict_goes_both_ways() -> None:
    model, other, x = MLP(), MLP(), example()
    with torch.no_grad():
        other.w.add_(1)
    new = convert(model)
    new.load_state_dict(other.state_dict())
    assert torch.equal(new(x), other.by_hand(x))
    other.load_state_dict(new.state_dict())


def test_what_the_graph_does_not_use_is_kept() -> None:
    gm = fx.symbolic_trace(MLP())
    gm.register_parameter("spare", nn.Parameter(torch.ones(2)))
    gm.register_buffer("note", torch.ones(2), persistent=False)
    gm.add_module("more", nn.Linear(2, 2))
    new = convert(gm)
    assert list(new.state_dict()) == list(gm.state_dict())
    assert [name for name, _ in new.named_buffers()] == [name for name, _ in gm.named_buffers()]
    assert new.more is gm.more


def test_a_constant_of_an_exported_program_does_not_become_a_buffer() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Module()
            self.constant, self.inner.constant = torch.randn(16, 16), torch.randn(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.constant @ self.inner.constant

    model, x = Constant(), example()
    old = torch.export.export(model, (x,)).module()
    new = convert(old)
    assert len(new.meta["fp8fx_report"].rewritten) == 2
    assert list(new.state_dict()) == list(old.state_dict()) == []
    assert torch.equal(new(x), mixed(mixed(x, model.constant, 64, 64), model.inner.constant, 64, 64))


# Shapes of models.


def test_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(32, 16)
            self.head = nn.Linear(16, 32, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.embed(tokens))

    model, tokens = Tied(), torch.arange(8)
    for new in (convert(model), convert(torch.export.export(model, (tokens,)))):
        assert set(new.state_dict()) == {"embed.weight", "head.weight"}
        assert new.get_parameter("embed.weight").data_ptr() == new.get_parameter("head.weight").data_ptr()
        assert torch.equal(new(tokens), mixed(model.embed(tokens), model.head.weight.t(), 64, 64))
        model.zero_grad()
        new(tokens).sum().backward()
        both = model.embed.weight.grad
        model.zero_grad()
        mixed(model.embed(tokens), model.head.weight.t(), 64, 64).sum().backward()
        assert torch.equal(both, model.embed.weight.grad)


def test_a_module_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = self.b = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)))

    model, x = Twice(), example()

    def linear(x: Tensor) -> Tensor:
        return mixed(x, model.a.weight.t(), 64, 64, bias=model.a.bias)

    for new in (convert(model), convert(torch.export.export(model, (x,)))):
        assert ops(new.graph)[mixed] == 2
        assert torch.equal(new(x), linear(torch.relu(linear(x))))


def test_a_module_of_two_names() -> None:
    """Of a shared module, the graph may call any of the names."""
    root, shared = nn.Module(), nn.Sequential(nn.Linear(16, 16))
    root.a, root.b = shared, shared
    graph = fx.Graph()
    graph.output(graph.call_module("a.0", (graph.call_module("b.0", (graph.placeholder("x"),)),)))
    gm = fx.GraphModule(root, graph)
    gm.b = gm.a  # one container, as in the root
    new = convert(gm)
    assert ops(new.graph)[mixed] == 2
    assert list(new.state_dict()) == list(gm.state_dict())
    x = example()
    once = mixed(x, shared[0].weight.t(), 64, 64, bias=shared[0].bias)
    assert torch.equal(new(x), mixed(once, shared[0].weight.t(), 64, 64, bias=shared[0].bias))


def test_a_deep_chain() -> None:
    model, x = nn.Sequential(*(nn.Linear(16, 16) for _ in range(20))), example()
    new = convert(model)
    assert ops(new.graph) == {aten.t.default: 20, mixed: 20}
    out = new(x)
    for linear in model:
        x = mixed(x, linear.weight.t(), 64, 64, bias=linear.bias)
    assert torch.equal(out, x)


@pytest.mark.parametrize("given", [None, (torch.randn(1, 3, 8, 8),)], ids=["", "example inputs"])
def test_a_model_with_nothing_to_rewrite_comes_back_unchanged(given: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    gm = fx.symbolic_trace(model)
    new = convert(gm, given)
    assert str(new.graph) == str(gm.graph)
    assert new.code == gm.code
    assert new.state_dict().keys() == gm.state_dict().keys()
    assert new.meta["fp8fx_report"].rows == ()


def test_converting_twice_changes_nothing() -> None:
    x = example()
    for old in (fx.symbolic_trace(MLP()), torch.export.export(MLP(), (x,)).module(), make_fx(MLP())(x)):
        once = convert(old, (x,))
        twice = convert(once, (x,))
        assert len(once.meta["fp8fx_report"].rewritten) == 2
        assert twice.meta["fp8fx_report"].rows == ()
        assert str(twice.graph) == str(once.graph)
        assert twice.code == once.code
        assert list(twice.state_dict()) == list(once.state_dict())
        assert torch.equal(twice(x), once(x))


def test_the_two_recipes_of_one_model_do_not_meet() -> None:
    gm = fx.symbolic_trace(MLP())
    a, b = convert(gm, recipe="mixed"), convert(gm, recipe="global")
    assert (ops(a.graph)[mixed], ops(b.graph)[mixed]) == (2, 0)
    assert ops(b.graph)[torch.ops.fp8fx.matmul_fp8_global.default] == 2


def test_a_partly_converted_model_is_converted_the_rest_of_the_way() -> None:
    model, x = MLP(), example()
    part = convert(model, exclude="fc")
    assert (ops(part.graph)["fc"], ops(part.graph)[mixed]) == (1, 1)
    whole = convert(part)
    assert torch.equal(whole(x), model.by_hand(x))


def test_meta_device() -> None:
    with torch.device("meta"):
        model = MLP()
    new = convert(model, (torch.empty(4, 16, device="meta"),))
    assert [row.executor for row in new.meta["fp8fx_report"].rows] == ["auto", "auto"]
    assert all(p.is_meta for p in new.parameters())
    assert new(torch.empty(4, 16, device="meta")).shape == (4, 16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    model, x = MLP().to(dtype), example().to(dtype)
    new = convert(model)
    assert torch.equal(new(x), model.by_hand(x))
    assert new(x).dtype == dtype
    assert sqnr(model(x).detach(), new(x).detach()) > 20


@pytest.mark.parametrize(("k", "bsz"), [(64, 64), (65, 128), (128, 128), (300, 512), (4096, 4096), (5000, 4096)])
def test_block_sizes_come_from_the_node_s_shapes(k: int, bsz: int) -> None:
    model = nn.Sequential(nn.Linear(k, 3, bias=False), nn.Linear(3, k, bias=False))
    new = convert(model)
    first, second = new.graph.find_nodes(op="call_function", target=mixed)
    assert (first.args[2:], second.args[2:]) == ((bsz, 64), (64, bsz))
    x = torch.randn(2, k)
    assert torch.equal(new(x), mixed(mixed(x, model[0].weight.t()), model[1].weight.t()))  # as the op derives them
    assert [(r.bsz, r.bsz2) for r in new.meta["fp8fx_report"].rows] == [(bsz, 64), (64, bsz)]


# What the result can do.


def test_stack_traces_and_module_stacks_stay() -> None:
    x = example()
    torch.compile(MLP(), backend=(capture := Capture()))(x)
    for new in (convert(torch.export.export(MLP(), (x,))), capture.only.after):
        first, second = new.graph.find_nodes(op="call_function", target=mixed)
        assert (module_path(first), module_path(second)) == ("fc", "")
        for node in (first, second):
            assert "F.gelu(self.fc(x)) @ self.w" in node.meta["stack_trace"]


@pytest.mark.parametrize("source", ["nn.Module", "ExportedProgram", "make_fx"])
def test_deepcopy(source: str) -> None:
    model, x = MLP(), example()
    new = SOURCES[source](model, x)
    other = copy.deepcopy(new)
    assert torch.equal(other(x), new(x))
    assert str(other.graph) == str(new.graph)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert torch.equal(new(x), model.by_hand(x))  # its parameters are its own


def test_pickle_and_save() -> None:
    model, x = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)), example()
    new = convert(model, (x,))
    buffer = io.BytesIO()
    torch.save(new, buffer)
    buffer.seek(0)
    for other in (pickle.loads(pickle.dumps(new)), torch.load(buffer, weights_only=False)):
        assert_same_graph(other.graph, new.graph)
        assert torch.equal(other(x), new(x))
        assert list(other.state_dict()) == list(new.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("source", ["nn.Module", "ExportedProgram"])
def test_the_result_exports_again(source: str) -> None:
    model, x = MLP(), example()
    new = SOURCES[source](model, x)
    again = torch.export.export(new, (x,))
    assert ops(again.graph)[mixed] == 2
    assert again.state_dict.keys() == model.state_dict().keys()
    buffer = io.BytesIO()
    torch.export.save(again, buffer)
    buffer.seek(0)
    assert torch.equal(torch.export.load(buffer).module()(x), model.by_hand(x))
    assert torch.equal(again.run_decompositions().module()(x), model.by_hand(x))


@pytest.mark.parametrize(("source", "dynamic"), [("nn.Module", False), ("nn.Module", True), ("ExportedProgram", False)])
def test_the_result_compiles(source: str, dynamic: bool) -> None:
    model, x = MLP(), example()
    new = SOURCES[source](model, x)
    compiled = torch.compile(new, backend="aot_eager", dynamic=dynamic, fullgraph=True)
    out = compiled(x)
    assert torch.equal(out, model.by_hand(x))
    out.sum().backward()
    got = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model.by_hand(x).sum().backward()
    for name, p in model.named_parameters():
        assert torch.equal(got[name], p.grad), name


def test_the_public_name() -> None:
    assert fp8fx.convert is convert
