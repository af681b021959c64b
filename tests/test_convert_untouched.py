"""convert leaves its input untouched: modules, programs, hooks, autocast states and training flags."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn

from fp8fx.convert import convert
from fp8fx.recipes.quantize import sqnr
from tests.support.capture import Capture
from tests.support.mlp import MLP, example, mixed


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
