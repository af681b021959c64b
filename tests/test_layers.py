"""Layers that repeat are compiled once: which are, and that they compute what they did."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._inductor.utils import fresh_cache

import fp8fx
import fp8fx.backend
from fp8fx.convert import rewritten
from fp8fx.layers import layers_compiled_once, schemas_found_once
from tests.support.layers import FEATURES, FLIPS, Decoder, Layer, assert_trains, compiled, steps
from tests.support.numbers import error

INVOKE = torch.ops.higher_order.invoke_subgraph


def inputs(count: int = 1, rows: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, rows, 32, generator=generator) for _ in range(count)]


def calls(model: nn.Module, dynamic: bool = False, check: bool = True) -> int:
    """How many calls of bodies a model's graph has; its results are those of the model."""
    torch._dynamo.reset()
    counts = []

    def backend(gm: fx.GraphModule, given: list[Any]) -> Callable[..., Any]:
        new, report = rewritten(gm, given, fp8fx.Config(profit="always"))
        assert report.rewritten
        layered = layers_compiled_once(new, given)
        counts.append(0 if layered is None else len(layered.graph.find_nodes(op="call_function", target=INVOKE)))
        if check and layered is not None:
            x = [torch.randn(g.shape) if isinstance(g, Tensor) else int(g) for g in given]
            with torch.no_grad():  # a call of a body trains in a compiler alone
                for a, b in zip(layered(*x), new(*x), strict=True):
                    torch.testing.assert_close(a, b)
        return new.forward

    (x,) = inputs()
    if dynamic:
        torch._dynamo.mark_dynamic(x, 1)
    torch.compile(model, backend=backend, fullgraph=True)(x)
    (count,) = counts
    return count


def test_all_layers_but_one_are_calls_of_one_body() -> None:
    assert calls(Decoder(5)) == 4  # a layer is cut inside: the first one's begin and the last one's end are apart
    assert calls(Decoder(5).eval().requires_grad_(False)) == 4


class Writing(Layer):
    """Keeps its last input."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(2, 16, FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        self.last.copy_(x.detach())
        return super().forward(x)


class Kept(Decoder):
    """Gives the input of each layer as well."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        kept = [self.first(x)]
        for layer in self.layers:
            kept.append(layer(kept[-1]))
        return tuple(kept)


def layers_of(kind: Callable[[int], nn.Module]) -> Decoder:
    model = Decoder(4)
    model.layers = nn.ModuleList(kind(i) for i in range(4))
    return model


def test_layers_that_are_no_functions_of_their_inputs_are_left_alone() -> None:
    assert calls(Decoder(4, dropout=0.0).train()) == 3
    assert calls(Decoder(4, dropout=0.5).eval()) == 3
    assert calls(layers_of(lambda i: Writing())) == 0


def test_dropout_is_left_alone() -> None:
    assert calls(Decoder(4, dropout=0.5).train()) == 0


def test_frozen_layers_among_trained_ones_are_bodies_of_their_own() -> None:
    model = Decoder(8)
    for layer in model.layers[:4]:
        layer.requires_grad_(False)
    assert calls(model) == 6


def test_the_inputs_of_all_layers_may_be_results() -> None:
    assert calls(Kept(5)) == 4


def test_three_small_linears_are_no_layers() -> None:
    mlp = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
    assert calls(nn.Sequential(mlp, mlp)) == 0


def test_layers_of_two_kinds_that_follow_each_other() -> None:
    class Other(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(super().forward(x))

    model = Decoder(8)
    model.layers = nn.ModuleList([Layer() if i < 4 else Other() for i in range(8)])
    assert calls(model) == 6


def test_a_slice_may_have_symbolic_bounds() -> None:
    class Placed(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("places", torch.randn(64, FEATURES))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + self.places[: x.shape[1]])

    assert calls(layers_of(lambda i: Placed()), dynamic=True, check=False) == 3


def test_transforms_of_functions_have_no_bodies() -> None:
    class Mapped(Decoder):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for layer in self.layers:
                x = torch.func.vmap(lambda row, layer=layer: layer(row[None])[0])(x)
            return self.head(x)

    assert calls(Mapped(), check=False) == 0


def test_the_name_of_a_body_tells_what_it_computes() -> None:
    names: list[set[object]] = []

    def backend(gm: fx.GraphModule, given: list[Any]) -> Callable[..., Any]:
        new, _ = rewritten(gm, given, fp8fx.Config(profit="always"))
        layered = layers_compiled_once(new, given)
        assert layered is not None
        names.append({node.args[1] for node in layered.graph.find_nodes(op="call_function", target=INVOKE)})
        return gm.forward

    for model in (Decoder(), Decoder(4), layers_of(lambda i: nn.Sequential(Layer(), nn.ReLU()))):
        torch._dynamo.reset()
        torch.compile(model, backend=backend, fullgraph=True)(*inputs())
    assert names[0] == names[1] != names[2]


def test_a_body_is_analysed_once() -> None:
    find = INVOKE.gen_schema
    body = fx.symbolic_trace(lambda x: (x.sin(),))
    x = torch.randn(3)
    with schemas_found_once(), schemas_found_once():
        schemas = [INVOKE.gen_schema(body, name, x) for name in ("a", "a", "b")]
        assert schemas[0] is schemas[1]
        assert schemas[0] is not schemas[2]
    assert INVOKE.gen_schema == find


def test_another_activation_makes_another_layer() -> None:
    class Other(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(super().forward(x))

    assert calls(layers_of(lambda i: Other() if i == 1 else Layer())) == 0


@pytest.mark.compiles
def test_training_gives_what_the_ops_give_the_second_time_from_the_cache() -> None:
    with fresh_cache():
        for _ in range(2):
            torch._dynamo.reset()
            assert_trains(Decoder(), inputs(2), recipe="global")


class Residual(nn.Module):
    """A layer without biases, whose backward ends with a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(FEATURES)
        self.first = nn.Linear(FEATURES, 2 * FEATURES, bias=False)
        self.second = nn.Linear(2 * FEATURES, 2 * FEATURES, bias=False)
        self.third = nn.Linear(2 * FEATURES, 2 * FEATURES, bias=False)
        self.last = nn.Linear(2 * FEATURES, FEATURES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.first(self.norm(x)))
        return x + self.last(F.silu(self.third(F.silu(self.second(y)))))


@pytest.mark.compiles
def test_the_backward_of_a_body_overwrites_nothing_that_it_is_given() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, FEATURES), *(Residual() for _ in range(4)), nn.Linear(FEATURES, 32))
    assert_trains(model, [torch.randn(64, 32)], recipe="global")


@pytest.mark.compiles
def test_symbolic_sizes() -> None:
    model = Decoder()
    eager = copy.deepcopy(model)
    backend = fp8fx.Backend(fp8fx.Config(profit="always"))
    call = torch.compile(model, backend=backend, fullgraph=True)
    given = [*inputs(1), *inputs(1, rows=24)]
    for x in given:
        torch._dynamo.mark_dynamic(x, 1)
    expected = steps(fp8fx.convert(eager, profit="always"), eager, given)
    for value, reference in zip(steps(call, model, given), expected, strict=True):
        assert error(value, reference) < FLIPS
    assert len(backend.reports) == 1


@pytest.mark.compiles
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_frozen_layers(autocast: bool) -> None:
    (x,) = inputs()
    model = Decoder().eval().requires_grad_(False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = fp8fx.convert(model, profit="always")(x)
        call, _ = compiled(model, freeze=True)
        assert error(call(x), expected) < FLIPS


def test_layers_that_train_under_autocast_are_left_alone() -> None:
    class Within(Decoder):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    assert calls(Within()) == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert calls(Decoder()) == 0
        with torch.no_grad():
            assert calls(Decoder()) == 2


@pytest.mark.compiles
def test_each_layer_is_compiled_if_once_is_not_wanted_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    (x,) = inputs()
    bodies: list[bool] = []
    compile_rewritten = fp8fx.backend.compile_rewritten

    def fails(*args: Any, has_bodies: bool = False) -> Callable[..., Any]:
        bodies.append(has_bodies)
        if has_bodies:
            raise IndexError("a fault of the compiler")
        return compile_rewritten(*args)

    monkeypatch.setattr(fp8fx.backend, "compile_rewritten", fails)
    model = Decoder().requires_grad_(False)
    expected = fp8fx.convert(model, profit="always")(x)
    call, backend = compiled(model)
    assert error(call(x), expected) < FLIPS
    assert (bodies, backend.reports[0].failures) == ([True, False], ())
    torch._dynamo.reset()
    call, _ = compiled(model, layers="each")
    assert error(call(x), expected) < FLIPS
    assert bodies[2:] == [False]
