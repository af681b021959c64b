"""What training compiles to under autocast, with frozen weights, adapters, checkpoints, padding, and GEMMs left in high
precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._guards import TracingContext
from torch.utils.checkpoint import checkpoint

import fp8fx
from tests.support.steps import (
    BF16,
    DGRAD,
    E4M3,
    E5M2,
    FORWARD,
    MM,
    SCALED_MM,
    WGRAD,
    Block,
    Capture,
    assert_chosen_gemms_stay_in_high_precision,
    aten,
    calls,
    gradients,
    linear,
    operands,
    recipes,
    results,
    rows,
    training_step,
    value,
)

pytestmark = pytest.mark.slow  # each builds a block and traces its training step

# Inductor's GEMMs sum in another order than eager ones. Such an ulp may push a value of the next layer's input over to
# the next FP8 value.
FLIPS = 1e-2


def shape_guards() -> list[Any]:
    """The guards on sizes of what is being compiled: the list itself, which grows until the compilation is done."""
    context = TracingContext.try_get()
    assert context is not None and context.fake_mode is not None and context.fake_mode.shape_env is not None
    return context.fake_mode.shape_env.guards


class Autocast(nn.Module):
    """Parameters in float32, computed in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(48, 96), nn.Linear(96, 48)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", BF16):
            return self.down(self.up(x).tanh())


@recipes
def test_under_autocast_the_weights_casts_are_not_saved(recipe: str) -> None:
    step = training_step(Autocast(), rows(), recipe=recipe)
    assert step.gemms("up") == step.gemms("down") == ([FORWARD], [DGRAD], [WGRAD[recipe]])
    assert not {step.weight("up"), step.weight("down")} & {step.name(node) for node in step.saved}


def test_the_compiler_knows_which_inputs_are_weights() -> None:
    """It saves them at no cost, and CUDA graphs read them where they are."""
    model = Autocast()
    capture = Capture(model)
    torch.compile(model, backend=capture, fullgraph=True, dynamic=False)(rows())
    placeholders = [node.name for node in capture.step.forward.find_nodes(op="placeholder")]
    assert {placeholders[i] for i in capture.static[0]} == set(capture.parameters.values())


@recipes
def test_a_frozen_weight_gets_no_wgrad_and_its_input_is_not_saved(recipe: str) -> None:
    step = training_step(nn.Sequential(linear(48, 96).requires_grad_(False)), rows(), recipe=recipe)
    assert step.gemms("0") == ([FORWARD], [DGRAD], [])
    assert len(calls(step.backward, SCALED_MM, MM)) == 1
    weight, scale, *others = [node for node in results(step.forward)[1:] if node is not None]
    assert (weight.name, value(scale).shape, others) == (step.weight("0"), (), [])


class LoRA(nn.Module):
    """A frozen linear and a trained one of low rank."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.a, self.b = linear(48, 96).requires_grad_(False), linear(48, 8), linear(8, 96)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


@recipes
def test_lora_trains_its_adapter_alone(recipe: str) -> None:
    step = training_step(LoRA(), rows(), recipe=recipe)
    assert step.gemms("base") == ([FORWARD], [DGRAD], [])
    assert step.gemms("a") == step.gemms("b") == ([FORWARD], [DGRAD], [WGRAD[recipe]])
    assert len(calls(step.backward, SCALED_MM, MM)) == 5
    # Three weights, one input for two of them and one for the third, a gradient for two and one for the third.
    assert list(step.amaxes().values()) == [1] * (3 + 2 + 2)


@recipes
def test_an_input_without_a_gradient_gets_no_dgrad_and_its_weight_no_second_cast(recipe: str) -> None:
    step = training_step(
        nn.Sequential(linear(48, 96), nn.Tanh(), linear(96, 64)), rows(requires_grad=False), recipe=recipe
    )
    assert step.gemms("0") == ([FORWARD], [], [WGRAD[recipe]])
    assert step.gemms("2") == ([FORWARD], [DGRAD], [WGRAD[recipe]])
    assert (step.casts()[step.weight("0")], step.casts()[step.weight("2")]) == (1, 2)
    assert step.weight("0") not in [node.name for node in step.backward.find_nodes(op="placeholder")]


@recipes
def test_inference_has_no_backward_and_one_gemm_a_linear(recipe: str) -> None:
    with torch.no_grad():
        step = training_step(Block(), rows(), recipe=recipe)
    assert not calls(step.backward, SCALED_MM, MM)
    assert [step.gemms(name) for name in Block.LINEARS] == [([FORWARD], [], [])] * 7
    assert len(calls(step.forward, SCALED_MM)) == 7
    assert list(step.amaxes().values()) == list(step.casts().values()) == [1] * (7 + 4)


class Ragged(nn.Module):
    """A weight (K, N) as it is, and one transposed, in float32, where executors differ by the order of their sums
    alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(48, 96) / 7), nn.Parameter(torch.randn(64, 96) / 10)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear((x @ self.a).tanh(), self.b)


def assert_gradients_of(model: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor, recipe: str) -> None:
    """Those of the converted model, as the `simulated` executor computes them."""
    reference = fp8fx.convert(model, recipe=recipe, executor="simulated")
    for found, expected in zip(gradients(call, model, x), gradients(reference, model, x), strict=True):
        assert found.shape == expected.shape
        assert (found.double() - expected.double()).norm() < FLIPS * expected.double().norm()


def test_wgrad_pads_where_m_is_no_multiple_of_16() -> None:
    model, x = Ragged(), rows(33, torch.float32)
    capture = Capture(model, recipe="global")
    assert_gradients_of(model, torch.compile(model, backend=capture, fullgraph=True, dynamic=False), x, "global")
    step = capture.step
    assert capture.backend.reports[0].refused == ()
    assert step.gemms("a") == ([FORWARD], [DGRAD], [(SCALED_MM, E4M3, E5M2)])
    assert step.gemms("b") == ([FORWARD], [DGRAD], [(SCALED_MM, E5M2, E4M3)])
    for name in ("a", "b"):
        wgrad = step.wgrad(name)
        assert wgrad is not None
        assert [value(x).shape[contracted] for x, contracted in zip(operands(wgrad), (1, 0), strict=True)] == [48, 48]
    assert len(calls(step.backward, aten.constant_pad_nd.default)) == 4
    assert not calls(step.forward, aten.constant_pad_nd.default)


def compilations(
    model: nn.Module, compiler: Callable[..., Any], check: Callable[[Callable[..., Any], Tensor], Any]
) -> list[list[str]]:
    """The guards on sizes of each compilation that a few sizes of M take."""
    torch._dynamo.reset()
    guards: list[list[Any]] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        guards.append(shape_guards())
        return compiler(gm, example_inputs)  # type: ignore[no-any-return]

    call = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for m in (33, 48, 7):
        check(call, rows(m, torch.float32))
    return [[str(guard.expr) for guard in one] for one in guards]


@pytest.mark.slow
@recipes
def test_any_m_runs_in_one_compilation_without_a_guard(recipe: str) -> None:
    model = Ragged()
    eager = compilations(model, lambda gm, inputs: gm.forward, lambda call, x: call(x))
    fp8 = compilations(
        model, Capture(model, recipe=recipe), lambda call, x: assert_gradients_of(model, call, x, recipe)
    )
    assert len(fp8) == 1
    assert fp8 == eager


@pytest.mark.slow
@recipes
def test_a_gemm_that_is_not_worth_fp8_stays_in_high_precision(recipe: str) -> None:
    assert_chosen_gemms_stay_in_high_precision(recipe, "cpu")


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = linear(48, 96), linear(96, 48), linear(48, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(lambda y: self.down(self.up(y).tanh()), x, use_reentrant=False))


@recipes
def test_a_checkpoint_is_recomputed_with_one_amax_a_weight_in_each_graph(recipe: str) -> None:
    step = training_step(Checkpointed(), rows(), recipe=recipe)
    assert step.gemms("up") == step.gemms("down") == ([FORWARD], [FORWARD, DGRAD], [WGRAD[recipe]])
    assert step.gemms("head") == ([FORWARD], [DGRAD], [WGRAD[recipe]])
    assert all(value(node).shape == () for node in step.saved)
    forward, backward = step.amaxes(step.forward), step.amaxes(step.backward)
    assert set(forward.values()) == set(backward.values()) == {1}
    assert [(forward[step.weight(name)], backward[step.weight(name)]) for name in ("up", "down", "head")] == [
        (1, 1),
        (1, 1),
        (1, 0),
    ]
