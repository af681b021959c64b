"""Training through the backend: convergence, optimizers, mixed precision, shared and frozen weights, checkpoints,
second derivatives.

What tests/support/training.py has of it runs on FP8 tensor cores, too.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fp8fx
from benchmarks import digits
from fp8fx.errors import DifferentiationError
from fp8fx.ops.matmul import op
from fp8fx.recipes.recipe import RECIPES
from tests.support import training
from tests.support.training import EXACT, FLIPS, UPDATES, assert_fp8_noise, assert_near, clones, fp8, gradients, mlp

recipes = pytest.mark.parametrize("recipe", ["mixed", "global"])


# Convergence.


@pytest.mark.compiles
def test_digits_are_learned_as_well_as_in_float32() -> None:
    accuracies = {name: [accuracy for _, accuracy in found] for name, found in digits.runs()}
    for found in accuracies.values():
        for accuracy, reference in zip(found, accuracies["float32"], strict=True):
            assert accuracy > 95 and abs(accuracy - reference) <= 0.5, accuracies  # 4 of 896 images


# Gradients that add up.


@pytest.mark.compiles
@recipes
def test_gradients_of_micro_batches_add_up_to_the_bit(recipe: str) -> None:
    training.assert_micro_batches_add_up(recipe, "cpu")


@pytest.mark.compiles
@recipes
def test_a_tied_embedding_gets_both_gradients(recipe: str) -> None:
    training.assert_a_tied_embedding_gets_both_gradients(recipe, "cpu")


@pytest.mark.compiles
@recipes
def test_a_block_called_twice_gets_the_sum_of_both_gradients(recipe: str) -> None:
    training.assert_a_shared_block_gets_both_gradients(recipe, "cpu")


@pytest.mark.compiles
@recipes
def test_an_adapter_of_a_frozen_weight(recipe: str) -> None:
    training.assert_an_adapter_of_a_frozen_weight_trains(recipe, "cpu")


@pytest.mark.compiles
@recipes
def test_each_gemm_may_stay_in_high_precision(recipe: str) -> None:
    training.assert_each_gemm_may_stay_in_high_precision(recipe, "cpu")


@pytest.mark.compiles
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_gradient_of_each_reduction(recipe: str) -> None:
    training.assert_the_gradient_of_each_reduction_is_right(recipe, "cpu")


# Weights that change between steps.


@pytest.mark.compiles
@recipes
@pytest.mark.parametrize("update", UPDATES)
def test_the_step_after_an_update_computes_with_the_new_weights(update: str, recipe: str) -> None:
    training.assert_steps_compute_with_new_weights([update] * 3, recipe, "cpu")


@pytest.mark.compiles
@recipes
def test_the_steps_after_different_updates_compute_with_the_new_weights(recipe: str) -> None:
    training.assert_steps_compute_with_new_weights(list(UPDATES), recipe, "cpu")


@pytest.mark.compiles
@recipes
def test_a_copy_and_a_resumed_run_go_on_with_the_same_losses_to_the_bit(recipe: str) -> None:
    training.assert_a_copy_and_a_resumed_run_go_on_with_the_same_losses(recipe, "cpu")


@recipes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_a_converted_model_changes_no_bit(use_reentrant: bool, dtype: torch.dtype, recipe: str) -> None:
    model, x = mlp().to(dtype), torch.randn(16, 64, dtype=dtype, requires_grad=True)
    converted = fp8fx.convert(model, recipe=recipe)
    found = []
    for call in (converted, lambda x: checkpoint(converted, x, use_reentrant=use_reentrant)):
        model.zero_grad()
        x.grad = None
        out = call(x)
        out.float().square().sum().backward()
        found.append([out, x.grad, *gradients(model)])
    assert all(torch.equal(plain, recomputed) for plain, recomputed in zip(*found, strict=True))


# Mixed precision.

ONES, NAN = torch.ones(16, 64), torch.ones(16, 64)
NAN[3, 5] = math.nan
SPOILED = {  # the input, the scale of the loss, and where the values stop being finite
    "an activation that overflows": (ONES * 5.5e4, 2.0**10, "forward"),
    "a NaN in the input": (NAN, 2.0**10, "forward"),
    "a gradient that arrives as inf": (ONES, 2.0**40, "loss"),
    "a gradient that overflows on its way": (ONES, 2.0**14, "backward"),
}


@pytest.mark.compiles
@recipes
@pytest.mark.parametrize("what", SPOILED)
def test_grad_scaler_skips_a_step_that_is_not_finite_and_takes_a_clean_one(what: str, recipe: str) -> None:
    model, target = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)), torch.rand(16, 64) + 0.5
    compiled, _ = fp8(model, recipe)
    x, scale, where = SPOILED[what]
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=scale), torch.optim.SGD(model.parameters(), lr=0.1)

    def step(x: Tensor) -> tuple[bool, Tensor]:
        """Whether it was taken, and the output."""
        before = clones(model)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            out: Tensor = compiled(x)
        out.retain_grad()
        scaler.scale((out.float() * target).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        return any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)), out

    taken, out = step(x)
    assert not taken and scaler.get_scale() == scale / 2
    assert out.dtype == torch.float16 and bool(out.isfinite().all()) == (where != "forward")
    assert out.grad is not None and bool(out.grad.isfinite().all()) == (where != "loss")
    assert not any(grad.isfinite().all() for grad in gradients(model)[::2])  # of both weights, not only of a bias
    clean, plain, halved = torch.randn(16, 64), copy.deepcopy(model), 1
    plain.zero_grad()
    (plain(clean) * target).sum().backward()
    while not step(clean)[0]:
        halved += 1
        assert where != "forward" and halved < 40  # only the scale was at fault
    assert scaler.get_scale() == scale / 2**halved
    assert_near(gradients(model), gradients(plain), 0.1)  # unscaled by the step


@pytest.mark.compiles
@recipes
def test_autocast_around_the_model_and_inside_it(recipe: str) -> None:
    training.assert_autocast_around_the_model_and_inside_it(recipe, "cpu")


# What a model may do.


@pytest.mark.compiles
@recipes
def test_dropout_is_active_in_training_only_and_each_mode_is_compiled_once(recipe: str) -> None:
    training.assert_dropout_in_training_only(recipe, "cpu")


@pytest.mark.compiles
@recipes
def test_a_graph_break_changes_no_loss(recipe: str) -> None:
    training.assert_a_graph_break_changes_no_loss(recipe, "cpu")


@pytest.mark.compiles
@recipes
def test_integers_pass_through_untouched(recipe: str) -> None:
    training.assert_integers_pass_through(recipe, "cpu")


@pytest.mark.compiles
def test_what_is_written_in_place_keeps_its_gradients() -> None:
    """Backward computes activations again, from tensors that the graph has changed by then."""
    model, rows = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)]), torch.tensor([3, 1])

    def forward(
        first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor], x: Tensor, shift: Tensor
    ) -> Tensor:
        h = torch.relu(first(x) + shift)
        h = h.index_put((rows,), shift.sin())
        shift.mul_(-3)
        y = h.sin()
        y.mul_(2)
        return second(y)

    compiled, backend = fp8(lambda x, shift: forward(*model, x, shift), "mixed", fullgraph=True)
    by_hand = [lambda x, linear=linear: op("mixed")(x, linear.weight.t(), bias=linear.bias) for linear in model]
    x, start, grad, results = torch.randn(16, 64, requires_grad=True), torch.randn(64), torch.randn(16, 64), []
    for call in (compiled, lambda x, shift: forward(*by_hand, x, shift)):
        shift = start.clone()
        out = call(x, shift)
        results.append([out, shift, *torch.autograd.grad(out, (x, *model.parameters()), grad)])
    assert_near(results[0], results[1], FLIPS)
    assert len(backend.reports[0].rewritten) == 2


@pytest.mark.compiles
def test_a_matmul_of_integers_is_left_alone() -> None:
    head, table = nn.Linear(64, 128), nn.Buffer(torch.randint(10**6, (4, 4)))
    compiled, backend = fp8(lambda x, counts: (head(x), counts @ table), "mixed")
    counts = torch.randint(10**6, (4, 4))
    with torch.no_grad():
        assert torch.equal(compiled(torch.randn(16, 64), counts)[1], counts @ table)
    (row,) = backend.reports[0].refused
    assert row.reason == "the input is int64; FP8 takes float32, float16 or bfloat16"


@pytest.mark.compiles
@recipes
def test_batches_of_any_size_are_one_compilation(recipe: str) -> None:
    model, graphs = nn.Linear(64, 128), []
    peek = {"post_grad_custom_post_pass": lambda graph: graphs.append(graph)}
    compiled, backend = fp8(model, recipe, dynamic=True, options=peek)
    for m in (7, 12, 33, 16):
        x, grad = torch.randn(m, 64, requires_grad=True), torch.randn(m, 128)
        outs = compiled(x), op(recipe)(x, model.weight.t(), bias=model.bias)
        found, expected = ([out, *torch.autograd.grad(out, [x, *model.parameters()], grad)] for out in outs)
        assert_near(found, expected, EXACT)
    assert (len(backend.reports), len(graphs)) == (1, 2)  # forward and backward


# Gradients of gradients.


@recipes
@pytest.mark.parametrize("of", [0, 1, 2], ids=["input", "weight", "bias"])
def test_a_gradient_of_a_converted_model_is_not_differentiated_again(of: int, recipe: str) -> None:
    training.assert_a_gradient_is_not_differentiated_again(of, recipe, "cpu")


@recipes
def test_no_second_derivative_is_silently_left_out(recipe: str) -> None:
    """Of a loss and a penalty on the second weight's gradient, with respect to the first weight alone."""
    model = mlp()
    first, _, second, _ = model.parameters()
    loss = fp8fx.convert(model, recipe=recipe)(torch.randn(16, 64)).sum()
    (grad,) = torch.autograd.grad(loss, second, create_graph=True)
    with pytest.raises(DifferentiationError, match=f"matmul_fp8_{recipe}"):
        torch.autograd.grad(loss + grad.square().sum(), first)


@recipes
def test_a_penalty_behind_which_no_linear_is_fp8_trains_those_before(recipe: str) -> None:
    """What DifferentiationError advises."""
    model, x, hidden, found = mlp(), torch.randn(16, 64), [], []
    model[1].register_forward_hook(lambda module, args, out: hidden.append(args[0]))
    for call in (fp8fx.convert(model, recipe=recipe, exclude="2"), model):
        model.zero_grad()
        (grad,) = torch.autograd.grad(call(x).square().sum(), hidden[-1], create_graph=True)
        grad.square().sum().backward()
        found.append(gradients(model))
    assert_fp8_noise(found[0], found[1])


@pytest.mark.compiles
@recipes
def test_a_compiled_model_refuses_to_be_differentiated_again(recipe: str) -> None:
    training.assert_a_compiled_model_refuses_to_be_differentiated_again(recipe, "cpu")
