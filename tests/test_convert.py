"""convert: any graph in, the same module with FP8 linears out; the input is untouched."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import fp8fx
from fp8fx.config import Config
from fp8fx.convert import convert
from fp8fx.errors import ConfigError, FP8Error, GraphError
from fp8fx.graph.names import module_path
from fp8fx.graph.values import fake
from fp8fx.recipes.quantize import sqnr
from tests.support.capture import Capture, assert_same_graph, ops

aten = torch.ops.aten
mixed = torch.ops.fp8fx.matmul_fp8_mixed.default


class MLP(nn.Module):
    """A linear called as a module, one written out, a buffer that is saved and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(16, 32)
        self.w = nn.Parameter(torch.randn(32, 16) / 4)
        self.register_buffer("scale", torch.rand(16))
        self.register_buffer("shift", torch.rand(16), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.fc(x)) @ self.w * self.scale + self.shift

    def by_hand(self, x: Tensor) -> Tensor:
        h = mixed(x, self.fc.weight.t(), 64, 64, bias=self.fc.bias)
        return mixed(F.gelu(h), self.w, 64, 64) * self.scale + self.shift


def example() -> Tensor:
    return torch.randn(4, 16)


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


# Signatures.


class Defaults(nn.Module):
    """Keyword arguments and defaults."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor, scale: float = 2.0, *, shift: Tensor | None = None) -> Tensor:
        y = self.fc(x) * scale
        return y if shift is None else y + shift


class Starred(nn.Module):
    """Any arguments at all."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return self.fc(x) + args[0] * kwargs["scale"]


def test_signature_with_defaults() -> None:
    model, x = Defaults(), example()
    gm = fx.symbolic_trace(model, concrete_args={"shift": None})
    new = convert(gm)
    assert inspect.signature(new.forward) == inspect.signature(gm.forward)
    y = mixed(x, model.fc.weight.t(), 64, 64, bias=model.fc.bias)
    assert torch.equal(new(x), y * 2)
    assert torch.equal(new(x=x, scale=3.0), y * 3)
    for given in ((x,), (x, 3.0), [x]):
        assert len(convert(gm, given).meta["fp8fx_report"].rewritten) == 1


def test_signature_of_annotations() -> None:
    gm = fx.symbolic_trace(MLP())
    assert inspect.signature(convert(gm).forward) == inspect.signature(gm.forward)


@pytest.mark.parametrize("given", [None, (torch.randn(4, 16),)], ids=["", "example inputs"])
def test_signature_with_stars(given: Any) -> None:
    model, x = Starred(), example()
    gm = fx.symbolic_trace(model)
    new = convert(gm, given)
    assert inspect.signature(new.forward) == inspect.signature(gm.forward)
    y = mixed(x, model.fc.weight.t(), 64, 64, bias=model.fc.bias)
    assert torch.equal(new(x, x, scale=x), y + x * x)


class Pair(NamedTuple):
    """An input of two tensors."""

    left: Tensor
    right: Tensor


def test_pytrees_of_an_exported_module() -> None:
    class Tree(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, pair: Pair, *, options: dict[str, Any]) -> dict[str, Any]:
            y = self.fc(pair.left)
            return {"y": y, "rest": [pair.right, (y + options["shift"],)]}

    model, x = Tree(), example()
    args, kwargs = (Pair(x, x + 1),), {"options": {"shift": torch.ones(16)}}
    old = torch.export.export(model, args, kwargs).module()
    new = convert(old)
    assert inspect.signature(new.forward) == inspect.signature(old.forward)
    out = new(*args, **kwargs)
    y = mixed(x, model.fc.weight.t(), 64, 64, bias=model.fc.bias)
    assert isinstance(out["rest"][1], tuple)
    assert torch.equal(out["y"], y)
    assert torch.equal(out["rest"][0], x + 1)
    assert torch.equal(out["rest"][1][0], y + 1)


# The input is untouched.


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    """All there is to a module, to be compared."""
    graph = (
        (model.code, str(model.graph), [dict(n.meta) for n in model.graph.nodes], dict(model.meta))
        if isinstance(model, fx.GraphModule)
        else ()
    )
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return (
        *graph,
        list(model.__dict__),
        list(model.state_dict()),
        [(name, id(x), x._version, x.tolist()) for name, x in tensors],
        [(name, id(m), m.training) for name, m in model.named_modules()],
    )


class Normed(nn.Module):
    """Modules that behave differently in training, and count their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("given", [None, (torch.randn(4, 16),)], ids=["", "example inputs"])
@pytest.mark.parametrize("model", [MLP(), Normed()], ids=lambda m: type(m).__name__)
def test_the_input_is_untouched(model: nn.Module, given: Any, training: bool) -> None:
    gm = fx.symbolic_trace(model).train(training)
    gm.meta["mine"] = 1
    before, random = snapshot(gm), torch.get_rng_state()
    new = convert(gm, given)
    assert snapshot(gm) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert new is not gm
    assert new.graph is not gm.graph
    assert new.training is training
    assert new.meta["mine"] == 1
    assert "fp8fx_report" not in gm.meta
    new.meta["other"] = 1
    assert "other" not in gm.meta


def test_a_plain_module_is_untouched() -> None:
    model = MLP()
    before = snapshot(model)
    assert len(convert(model, (example(),)).meta["fp8fx_report"].rewritten) == 2
    assert snapshot(model) == before


def test_a_constant_that_tracing_makes_does_not_stay_on_the_model() -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("w", torch.randn(16, 16))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w.t()

    model, x = Transposed(), example()
    before = snapshot(model)
    new = convert(model)
    assert snapshot(model) == before
    assert list(new.state_dict()) == ["w"]
    assert torch.equal(new(x), mixed(x, model.w.t(), 64, 64))


def test_an_exported_program_is_untouched() -> None:
    ep = torch.export.export(MLP(), (example(),))
    before = str(ep), list(ep.state_dict)
    convert(ep)
    assert (str(ep), list(ep.state_dict)) == before


def test_graph_hooks_and_grad_and_autocast_states_are_left_alone() -> None:
    model = MLP()

    def autocast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    def no_grad(x: Tensor) -> Tensor:
        with torch.no_grad():
            return model(x)

    for function in (autocast, no_grad):
        out = torch.compile(function, backend=Capture())(example())
        assert out.dtype == function(example()).dtype
        assert out.requires_grad == function(example()).requires_grad
        assert not torch.is_autocast_enabled("cpu")
        assert torch.is_grad_enabled()


def test_training_and_evaluation_behave_as_before() -> None:
    model, x = Normed(), example()
    new = convert(model, (x,))
    norm = model.layers[1]
    new.train()
    a, b = new(x), new(x)
    assert not torch.equal(a, b)  # dropout
    assert int(norm.num_batches_tracked) == 2
    new.eval()
    assert torch.equal(new(x), new(x))
    assert int(norm.num_batches_tracked) == 2
    first, _, _, last = model.layers
    h = norm(mixed(x, first.weight.t(), 64, 64, bias=first.bias))
    assert torch.equal(new(x), mixed(h, last.weight.t(), 64, 64, bias=last.bias))


def test_nested_modules_keep_their_training_flag() -> None:
    model = Normed()
    model.layers[1].eval()  # frozen statistics
    new = convert(fx.symbolic_trace(model))
    assert new.get_submodule("layers.1").training is False
    assert new.get_submodule("layers.2").training is True


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


# Example inputs.


def test_example_inputs_fill_in_m() -> None:
    gm, x = fx.symbolic_trace(MLP()), torch.randn(2, 3, 16)
    assert [row.m for row in convert(gm).meta["fp8fx_report"].rows] == ["?", "?"]
    new = convert(gm, (x,))
    assert [row.m for row in new.meta["fp8fx_report"].rows] == ["6", "6"]
    assert new.meta["fp8fx_report"].flops_share == 1
    values = {n.name: fake(n) for n in new.graph.nodes if n.target is mixed}
    assert [tuple(v.shape) for v in values.values() if v is not None] == [(2, 3, 32), (2, 3, 16)]


def test_a_weight_among_the_inputs() -> None:
    w, x = nn.Parameter(torch.randn(8, 16)), example()
    gm = make_fx(lambda w, x: F.linear(x, w))(w, x)
    (row,) = convert(gm).meta["fp8fx_report"].rows  # make_fx does not tell a parameter from another input
    assert row.reason == "activation times activation"
    new = convert(gm, (w, x))
    assert torch.equal(new(w, x), mixed(x, w.t(), 64, 64))


@pytest.mark.parametrize("given", [(), (1, 2), [torch.randn(4, 16)] * 3], ids=["none", "two", "three"])
def test_the_wrong_number_of_example_inputs(given: Any) -> None:
    for gm in (fx.symbolic_trace(MLP()), make_fx(MLP())(example())):
        name = gm.graph.find_nodes(op="placeholder")[0].name
        with pytest.raises(GraphError, match=rf"got {len(given)} example inputs for a graph of 1 inputs \({name}\); pass one for each"):
            convert(gm, given)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (torch.randn(4, 15), r"float32\(4, 15\)"),
        (torch.randn(2, 4, 15), r"float32\(2, 4, 15\)"),
        ("text", "'text'"),
        (None, "None"),
    ],
    ids=["K", "dimensions", "text", "None"],
)
def test_example_inputs_that_do_not_fit(given: Any, shown: str) -> None:
    model = MLP()
    with pytest.raises(GraphError, match=f"the graph does not run on the example inputs {shown}: "):
        convert(model, (given,))
    for gm in (make_fx(model)(example()), torch.export.export(model, (example(),)).module()):
        with pytest.raises(GraphError, match=rf"the graph was traced with \w+ as float32\(4, 16\); got {shown}$"):
            convert(gm, (given,))


def test_example_inputs_of_another_dtype() -> None:
    with pytest.raises(GraphError, match=r"the graph was traced with arg0_1 as float32\(4, 16\); got bfloat16\(4, 16\)$"):
        convert(make_fx(MLP())(example()), (example().bfloat16(),))


def test_a_graph_of_symbolic_sizes_takes_any_batch() -> None:
    ep = torch.export.export(MLP(), (example(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    new = convert(ep, (torch.randn(9, 16),))
    assert new.meta["fp8fx_report"].rows[0].m.startswith("s")
    model = MLP()
    for m in (2, 7):
        x = torch.randn(m, 16)
        assert torch.equal(new(x), model.by_hand(x))


@pytest.mark.parametrize("given", [torch.randn(4, 16), {"x": torch.randn(4, 16)}, "x"], ids=["tensor", "dict", "text"])
def test_example_inputs_are_a_tuple_or_list(given: Any) -> None:
    with pytest.raises(GraphError, match=f"example_inputs is a {type(given).__name__}; expected a tuple or list, one for each input"):
        convert(MLP(), given)


# Errors.


@pytest.mark.parametrize("given", [None, 3, "model", torch.randn(2), lambda x: x, MLP], ids=lambda g: type(g).__name__)
def test_not_a_model(given: Any) -> None:
    with pytest.raises(
        GraphError, match=rf"convert got a {type(given).__name__}; expected a GraphModule, an ExportedProgram or an nn\.Module"
    ) as error:
        convert(given)
    assert isinstance(error.value, FP8Error)
    assert isinstance(error.value, TypeError)


def test_a_model_that_cannot_be_traced() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(
        GraphError, match=r"symbolic_trace cannot trace Branches \(.*\); pass torch\.export\.export\(model, args\), or use torch\.compile"
    ) as error:
        convert(Branches())
    assert isinstance(error.value.__cause__, torch.fx.proxy.TraceError)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipes": "mixed"}, "unknown option 'recipes'; .* Did you mean 'recipe'"),
        ({"recipe": "mixd"}, "unknown recipe 'mixd'; expected one of global, mixed"),
        ({"executor": "gpu"}, "unknown executor 'gpu'; expected one of auto, bitsandbytes, scaled_mm, simulated"),
        ({"min_features": -1}, "min_features=-1 .*expected an int of at least 0"),
        ({"include": 3}, "include=3 is not a pattern"),
        ({"config": "mixed"}, r"config is a str; expected fp8fx\.Config"),
    ],
    ids=str,
)
def test_unknown_options_and_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        convert(MLP(), **options)


def test_options_win_over_the_config() -> None:
    new = convert(MLP(), config=Config(recipe="global", exclude="fc"), recipe="mixed")
    assert ops(new.graph)[mixed] == 1


def test_an_option_is_checked_before_the_model_is_traced() -> None:
    with pytest.raises(ConfigError):
        convert(3, recipe="fp4")  # type: ignore[arg-type]


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


@pytest.mark.parametrize("traced", [False, True])
def test_hooks_of_the_module_itself_run(traced: bool) -> None:
    gm, x = fx.symbolic_trace(MLP()) if traced else MLP(), example()
    expected, order = convert(gm)(x), list[str]()
    gm.register_forward_pre_hook(lambda module, args, kwargs: order.append("before"), with_kwargs=True)
    gm.register_forward_hook(lambda module, args, result: 2 * result)
    new = convert(gm)
    assert torch.equal(new(x), 2 * expected)
    assert order == ["before"]
    new.register_forward_hook(lambda module, args, result: 0 * result)
    assert sqnr(2 * expected, gm(x)) > 20  # which has no hook of the copy's


class _Remembers(nn.Module):
    """Looks at the module it is a copy of, and keeps what it computes."""

    types: ClassVar[list[type]] = []

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.last, self.seen = nn.Parameter(torch.ones(16)), None, list[Tensor]()
        self.own = [self]

    def forward(self, x: Tensor) -> Tensor:
        (original,) = self.own
        self.types.append(type(original.weight))
        self.last = x * self.weight
        self.seen.append(self.last)
        return self.last


def test_what_example_inputs_tell_leaves_the_modules_alone() -> None:
    root = nn.Module()
    root.leaf, root.normed = _Remembers(), nn.utils.weight_norm(nn.Linear(16, 16))
    graph = fx.Graph()
    graph.output(graph.call_module("normed", (graph.call_module("leaf", (graph.placeholder("x"),)),)))
    gm, x = fx.GraphModule(root, graph), example()
    _Remembers.types.clear()
    assert isinstance(convert(gm, (x,)), fx.GraphModule)
    assert _Remembers.types == [nn.Parameter]
    assert (root.leaf.last, root.leaf.seen) == (None, [])
    assert type(root.normed.weight) is Tensor
    assert root.normed.weight.norm().item() > 0


def test_hooks_of_the_user_s_own_are_given_no_fake_tensors() -> None:
    root, given = nn.Module(), list[Tensor]()
    root.relu, root.fc = nn.ReLU(), nn.Linear(16, 8)
    root.relu.register_forward_hook(lambda module, args, out: given.append(out))
    graph = fx.Graph()
    graph.output(graph.call_module("fc", (graph.call_module("relu", (graph.placeholder("x"),)),)))
    new = convert(fx.GraphModule(root, graph), (example(),))
    assert given == []
    assert [(row.m, row.reason) for row in new.meta["fp8fx_report"].rows] == [("?", None)]
    new(example())
    assert len(given) == 1


def test_what_is_not_initialized_is_left_alone() -> None:
    root = nn.Module()
    root.lazy = nn.LazyLinear(4)
    graph = fx.Graph()
    graph.output(graph.call_module("lazy", (graph.placeholder("x"),)))
    gm = fx.GraphModule(root, graph)
    for inputs in (None, (example(),)):
        new = convert(gm, inputs)
        assert [row.reason for row in new.meta["fp8fx_report"].rows] == ["the module has hooks"]
    assert new(example()).shape == (4, 4)


def test_code_that_no_fake_tensor_runs_through() -> None:
    def outside(x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy() + 1)

    root = nn.Module()
    root.fc = nn.Linear(16, 8).requires_grad_(False)
    graph = fx.Graph()
    graph.output(graph.call_module("fc", (graph.call_function(outside, (graph.placeholder("x"),)),)))
    gm = fx.GraphModule(root, graph)
    assert torch.equal(convert(gm, (example(),)).eval()(x := example()), convert(gm)(x))
