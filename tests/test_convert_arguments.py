"""convert keeps signatures, takes example inputs and options, and says what is wrong with them."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from fp8fx.config import Config
from fp8fx.convert import convert
from fp8fx.errors import ConfigError, FP8Error, GraphError
from fp8fx.executors import registry
from fp8fx.graph.values import fake
from tests.support.capture import ops
from tests.support.mlp import MLP, example, mixed

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
        with pytest.raises(
            GraphError, match=rf"got {len(given)} example inputs for a graph of 1 inputs \({name}\); pass one for each"
        ):
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
    with pytest.raises(
        GraphError, match=r"the graph was traced with arg0_1 as float32\(4, 16\); got bfloat16\(4, 16\)$"
    ):
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
    with pytest.raises(
        GraphError, match=f"example_inputs is a {type(given).__name__}; expected a tuple or list, one for each input"
    ):
        convert(MLP(), given)


# Errors.


@pytest.mark.parametrize("given", [None, 3, "model", torch.randn(2), lambda x: x, MLP], ids=lambda g: type(g).__name__)
def test_not_a_model(given: Any) -> None:
    with pytest.raises(
        GraphError,
        match=rf"convert got a {type(given).__name__}; expected a GraphModule, an ExportedProgram or an nn\.Module",
    ) as error:
        convert(given)
    assert isinstance(error.value, FP8Error)
    assert isinstance(error.value, TypeError)


def test_a_model_that_cannot_be_traced() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(
        GraphError,
        match=r"symbolic_trace cannot trace Branches \(.*\); "
        r"pass torch\.export\.export\(model, args\), or use torch\.compile",
    ) as error:
        convert(Branches())
    assert isinstance(error.value.__cause__, torch.fx.proxy.TraceError)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipes": "mixed"}, "unknown option 'recipes'; .* Did you mean 'recipe'"),
        ({"recipe": "mixd"}, "unknown recipe 'mixd'; expected one of global, mixed"),
        ({"executor": "gpu"}, f"unknown executor 'gpu'; expected one of {', '.join(sorted(registry.names()))}"),
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
