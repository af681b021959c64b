"""A compiled model over its life: copied, saved, called from threads and under transforms, next to others, and again in
another process."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch.autograd import forward_ad

import fp8fx
from fp8fx.errors import DifferentiationError
from fp8fx.ops.matmul import op
from fp8fx.recipes.quantize import sqnr
from tests.support.caching import assert_the_cache_knows_a_configuration_from_another
from tests.support.capture import Capture

RECIPES = ("mixed", "global")


def mlp() -> nn.Sequential:
    """All tests compile this one, for batches of 16, so that Inductor's cache spares them the C++ compiler."""
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))


def by_hand(model: Any, x: Tensor, recipe: str) -> Tensor:
    h = op(recipe)(x, model[0].weight.t(), bias=model[0].bias).tanh()
    out: Tensor = op(recipe)(h, model[2].weight.t(), bias=model[2].bias)
    return out


def compiled(model: nn.Module, recipe: str, **options: Any) -> Any:
    return torch.compile(model, backend="fp8", options={"recipe": recipe, **options})


def assert_is(out: Tensor, model: nn.Module, x: Tensor, recipe: str) -> None:
    """`model` by this recipe and no other; an ulp of another order of sums may push a value over to the next FP8
    value."""
    with torch.no_grad():
        distance = {name: float((out - by_hand(model, x, name)).norm() / out.norm()) for name in RECIPES}
    assert distance.pop(recipe) < 1e-2 < min(distance.values())


# Copies.


def through_a_file(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_a_file,
}


@pytest.mark.compiles
@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("backend", ["a name", "an object"])
def test_a_copy_of_a_compiled_model_keeps_its_recipe_and_has_its_own_weights(backend: str, way: str) -> None:
    model, x = mlp(), torch.randn(16, 64)
    by_object = torch.compile(model, backend=fp8fx.Backend(fp8fx.Config(recipe="global")))
    call = compiled(model, "global") if backend == "a name" else by_object
    before = call(x)
    other = COPIES[way](call)
    with torch.no_grad():
        model[2].weight.neg_()
    out = other(x)
    assert torch.equal(out, before)
    assert_is(out, other._orig_mod, x, "global")
    assert_is(call(x), model, x, "global")
    out.sum().backward()
    assert all(p.grad is not None for p in other.parameters()) and all(p.grad is None for p in model.parameters())


# Modes.


@pytest.mark.compiles
@pytest.mark.parametrize("freeze", [False, True], ids=["", "frozen"])
def test_weights_made_in_inference_mode(freeze: bool) -> None:
    with torch.inference_mode():
        model = mlp()
    call, x = compiled(model, "mixed", freeze=freeze), torch.randn(16, 64)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            assert_is(call(x), model, x, "mixed")
    with torch.inference_mode():
        for p in model.parameters():
            p.neg_()  # which no version counter sees
        if freeze:
            fp8fx.refresh(model)
        assert_is(call(x), model, x, "mixed")


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,))[1],
    "jacrev": lambda f, x: torch.func.jacrev(f)(x[0]),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x[0]),
}


@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated:DeprecationWarning"
)  # torch's own, at the first jvp
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform_of_a_converted_model_is_an_error_and_inside_a_compiled_one_high_precision(transform: str) -> None:
    model, x, apply = nn.Linear(64, 8), torch.randn(16, 64), TRANSFORMS[transform]
    with pytest.raises(DifferentiationError, match=r"torch\.func"):
        apply(fp8fx.convert(model), x)
    report = fp8fx.explain(lambda x: apply(model, x), x)
    assert [row.reason for row in report.rows] == ["the input is inside a transform of torch.func (vmap, grad, ...)"]


@pytest.mark.compiles
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform_of_a_compiled_model_is_in_high_precision(transform: str) -> None:
    """Dynamo leaves functions alone that are called inside a transform which it does not see."""
    model, x, apply = nn.Linear(64, 8), torch.randn(16, 64), TRANSFORMS[transform]
    torch.testing.assert_close(apply(torch.compile(model, backend="fp8"), x), apply(model, x), rtol=0, atol=0)


def along(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The derivative of f at x in the direction of x, in forward mode."""
    with forward_ad.dual_level():
        tangent: Tensor = forward_ad.unpack_dual(f(forward_ad.make_dual(x, x))).tangent
        return tangent


FORWARD: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "linearize": lambda f, x: torch.func.linearize(f, x)[1](x),
    "forward_ad": along,
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("transform", FORWARD)
@pytest.mark.parametrize(("trained", "freeze"), [(False, False), (True, False), (False, True)])
def test_forward_mode_through_a_converted_model_is_an_error_that_names_the_op(
    trained: bool, freeze: bool, transform: str
) -> None:
    model, x = fp8fx.convert(nn.Linear(64, 8).requires_grad_(trained), freeze=freeze), torch.randn(16, 64)
    with pytest.raises(
        DifferentiationError, match=r"^matmul_fp8_mixed was differentiated in forward mode .*, for which it has no rule"
    ):
        FORWARD[transform](model, x)
    with torch.no_grad():  # no gradient is left out there either
        assert torch.equal(model(x), model(x.clone().requires_grad_()))


@pytest.mark.compiles
@pytest.mark.parametrize("around", [False, True])
def test_forward_mode_and_a_compiled_function_are_in_high_precision(around: bool) -> None:
    """Whether it compiles all of it, or is called inside."""
    model, x, reason = (
        nn.Linear(64, 8),
        torch.randn(16, 64),
        "inside forward-mode differentiation (torch.autograd.forward_ad)",
    )

    def call(x: Tensor) -> Tensor:
        return (along(model, x) if around else model(x)) + 1

    def run(call: Callable[[Tensor], Tensor]) -> Tensor:
        return call(x) if around else along(call, x)

    capture = Capture()
    assert torch.equal(run(torch.compile(call, backend=capture)), run(call))
    reasons = [row.reason for graph in capture.graphs for row in graph.report.rows]
    assert reasons == [reason] or (
        not around and not reasons
    )  # torch 2.15 captures nothing of a call whose input is dual
    if around:  # else AOTAutograd itself has no rule for what it compiles
        with pytest.warns(fp8fx.FP8Warning, match="nothing was rewritten: 0 of 1 matmuls"):
            out = run(torch.compile(call, backend="fp8"))
        torch.testing.assert_close(out, run(call))
    capture = Capture()
    torch.compile(lambda x: (call(x), model(x)), backend=capture)(x)  # the level is over by then
    assert capture.only.report.rows[-1].reason is None


@pytest.mark.compiles
def test_linearize_inside_a_compiled_function_multiplies_tangents_in_fp8() -> None:
    """Which is linear: what Dynamo captures are the matmuls of the tangent, each one with a weight."""
    model, x, apply = nn.Linear(64, 8), torch.randn(16, 64), FORWARD["linearize"]
    assert 20 < sqnr(apply(model, x), torch.compile(lambda x: apply(model, x), backend="fp8")(x)) < 60


def test_vmap_of_a_converted_model_quantizes_each_sample_by_itself() -> None:
    model, x = mlp(), torch.randn(3, 16, 64)
    for recipe in RECIPES:
        out = torch.vmap(fp8fx.convert(model, recipe=recipe))(x)
        assert torch.equal(out, torch.stack([by_hand(model, sample, recipe) for sample in x]))


# Several at once.


@pytest.mark.compiles
def test_two_models_and_two_recipes_take_turns() -> None:
    models, x = [mlp(), mlp()], torch.randn(16, 64)
    calls = [(model, recipe, compiled(model, recipe)) for model in models for recipe in RECIPES]
    for _ in range(2):
        for model, recipe, call in calls:
            assert_is(call(x), model, x, recipe)
        for p in models[0].parameters():
            p.data.neg_()


def settings() -> list[dict[str, Any]]:
    return [config.get_config_copy() for config in (functorch_config, inductor_config, dynamo_config)]


@pytest.mark.compiles
@pytest.mark.parametrize("shared", [False, True], ids=["a model each", "one model"])
def test_four_threads_compile_and_call_at_once(shared: bool) -> None:
    models, recipes, together = [mlp() for _ in range(4)], RECIPES * 2, threading.Barrier(4, timeout=120)
    if shared:
        models, recipes = models[:1] * 4, RECIPES[:1] * 4
    call = compiled(models[0], recipes[0])
    failures: list[BaseException] = []
    steps: list[int] = []

    def work(model: nn.Module, recipe: str) -> None:
        try:
            before = settings()  # each thread has its own
            mine = call if shared else compiled(model, recipe)
            together.wait()
            for seed in range(3):
                x = torch.randn(16, 64, generator=torch.Generator().manual_seed(seed))
                out = mine(x)
                torch.autograd.grad(out.sum(), [*model.parameters()])
                assert_is(out, model, x, recipe)
                steps.append(seed)
            together.wait()
            assert settings() == before
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(models, recipes, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    assert sorted(steps) == [0] * 4 + [1] * 4 + [2] * 4


# Another process.


@pytest.mark.compiles
def test_the_cache_on_disk_knows_a_configuration_from_another_and_again_in_the_next_process(tmp_path: Path) -> None:
    assert_the_cache_knows_a_configuration_from_another(tmp_path, "cpu")
