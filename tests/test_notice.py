"""The warning that nothing of a model is FP8: once a model, when all its graphs are there."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo import compiled_autograd

import fp8fx
from fp8fx.torch_internals import compiled_call


class Parts(nn.Module):
    """Calls these modules one after the other, each in a graph of its own."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        x = self.parts[0](x)
        torch._dynamo.graph_break()
        x = self.parts[1](x)
        torch._dynamo.graph_break()
        return self.parts[2](x)


class Block(nn.Module):
    """A norm or a linear in a module that is not torch's own: Dynamo compiles it alone if it left out what calls it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Loop(Parts):
    """A loop with a graph break in it, which Dynamo leaves to Python: each part is compiled by itself."""

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
            torch._dynamo.graph_break()
        return x


class Hidden(nn.Module):
    """The linear runs where Dynamo does not look."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * 2) + 1

    @torch.compiler.disable
    def inner(self, x: Tensor) -> Tensor:
        return self.fc(x)


@pytest.fixture(autouse=True)
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_fx(
        gm: fx.GraphModule, inputs: list[Any], *inner: Any, config_patches: dict[str, Any]
    ) -> Callable[..., Any]:
        return gm.forward

    monkeypatch.setattr("fp8fx.lowering.compile_fx", compile_fx)


def warned(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if w.category is fp8fx.FP8Warning]


def norm() -> nn.Module:
    return Block(nn.LayerNorm(16))


def linear() -> nn.Module:
    return Block(nn.Linear(16, 16))


BACKENDS = {"by name": lambda: "fp8", "an object": fp8fx.Backend}


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [Parts, Loop])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_no_warning_if_one_graph_of_several_is_fp8(backend: str, kind: type[Parts], place: int) -> None:
    parts = [norm(), norm(), norm()]
    parts[place] = linear()
    compiled = torch.compile(kind(*parts), backend=BACKENDS[backend](), dynamic=False)
    assert warned(lambda: compiled(torch.randn(4, 16))) == []
    assert warned(lambda: compiled(torch.randn(5, 16))) == []  # compiles all of them again


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [Parts, Loop])
def test_one_warning_for_all_graphs_of_a_model_without_linears(backend: str, kind: type[Parts]) -> None:
    compiled = torch.compile(kind(norm(), norm(), norm()), backend=BACKENDS[backend](), dynamic=False)
    (message,) = warned(lambda: compiled(torch.randn(4, 16)))
    assert message.startswith("fp8: nothing was rewritten: no matmul was seen")
    assert warned(lambda: compiled(torch.randn(5, 16))) == []


def test_a_refusal_in_the_first_graph_is_none_of_the_model() -> None:
    model = Parts(linear(), norm(), linear())
    assert (
        warned(lambda: torch.compile(model, backend="fp8", options={"exclude": "parts.0*"})(torch.randn(4, 16))) == []
    )
    (message,) = warned(lambda: torch.compile(model, backend="fp8", options={"exclude": "*"})(torch.randn(4, 16)))
    assert message.startswith("fp8: nothing was rewritten: 0 of 2 matmuls")


def test_linears_that_no_graph_has_are_a_warning() -> None:
    assert len(warned(lambda: torch.compile(Hidden(), backend="fp8")(torch.randn(4, 16)))) == 1


@pytest.mark.parametrize("way", ["in place", "a method"])
@pytest.mark.parametrize("middle", [norm, linear])
def test_a_model_compiled_in_place_and_one_called_by_a_method(way: str, middle: Callable[[], nn.Module]) -> None:
    model = Parts(norm(), middle(), norm())
    call: Callable[[Tensor], Any] = model
    if way == "in place":
        model.compile(backend="fp8")
    else:
        call = torch.compile(model.forward, backend="fp8")
    assert len(warned(lambda: call(torch.randn(4, 16)))) == (middle is norm)


def test_each_model_has_a_warning_of_its_own() -> None:
    calls = [torch.compile(norm(), backend="fp8") for _ in range(2)]
    assert len(warned(lambda: calls[0](torch.randn(4, 16)))) == 1
    torch._dynamo.reset()  # of a model of the same code Dynamo would call the same graph
    assert len(warned(lambda: calls[1](torch.randn(4, 16)))) == 1


OPTIMIZERS = [torch.optim.SGD, torch.optim.AdamW, *([torch.optim.Muon] if hasattr(torch.optim, "Muon") else [])]


@pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_optimizer_alone_is_none(backend: str, kind: Any) -> None:
    layer = nn.Linear(16, 16, bias=False)
    optimizer = kind(layer.parameters(), lr=0.1)
    layer(torch.randn(4, 16)).sum().backward()
    assert warned(torch.compile(optimizer.step, backend=BACKENDS[backend]())) == []
    assert warned(torch.compile(lambda: optimizer.step(), backend=BACKENDS[backend]())) == []


def test_compiled_autograd_is_none() -> None:
    model, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU()), torch.randn(4, 16)

    def backward() -> None:
        with compiled_autograd._enable(torch.compile(backend="fp8")):
            model(x).sum().backward()

    assert warned(backward) == []
    assert all(p.grad is not None for p in model.parameters())


def test_a_function_is_warned_about_if_it_multiplies_a_weight() -> None:
    x, w, layer = torch.randn(4, 16), torch.randn(16, 16), nn.Linear(16, 16)
    assert warned(lambda: torch.compile(lambda x: x.relu(), backend="fp8")(x)) == []
    assert warned(lambda: torch.compile(lambda x, y: x @ y, backend="fp8")(x, w)) == []
    excluded = torch.compile(lambda x: F.linear(x, layer.weight), backend="fp8", options={"exclude": "*"})
    assert len(warned(lambda: excluded(x))) == 1


def test_a_warning_that_is_an_error_leaves_the_model_compiled() -> None:
    model, x = Parts(norm(), norm(), norm()), torch.randn(4, 16)
    compiled = torch.compile(model, backend="fp8")
    with pytest.raises(fp8fx.FP8Warning, match="nothing was rewritten"):
        compiled(x)
    torch.testing.assert_close(compiled(x), model(x))


def test_what_dynamo_has_around_a_call_is_there() -> None:
    """Names of Dynamo's own: without them each graph is judged by itself."""
    seen: list[bool] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        seen.append(isinstance(compiled_call()["cleanups"], list))
        return gm.forward

    torch.compile(lambda x: x + 1, backend=backend)(torch.randn(3))
    assert seen == [True]
    assert compiled_call() == {}
