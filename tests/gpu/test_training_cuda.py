"""Training on FP8 tensor cores: which GEMMs are worth it, GradScaler, checkpointing, frozen weights, fused optimizers,
memory.

And, through Inductor, what tests/support/training.py holds every device to, and the graphs of
tests/training/test_block_graphs.py.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fp8fx
from fp8fx.executors.hardware import has_fp8_tensor_cores
from fp8fx.recipes.quantize import sqnr
from tests.support import training
from tests.support.steps import assert_chosen_gemms_stay_in_high_precision, steps_of_a_block
from tests.training.test_block_graphs import OF_A_BLOCK

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not has_fp8_tensor_cores(torch.device("cuda")), reason="needs a CUDA device of compute capability >= 8.9"
    ),
]

recipes = pytest.mark.parametrize("recipe", ["mixed", "global"])


def backend(recipe: str, profit: str = "always") -> fp8fx.Backend:
    return fp8fx.Backend(fp8fx.Config(recipe=recipe, profit=profit))


def mlp(dtype: torch.dtype = torch.bfloat16, width: int = 256) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)).to("cuda", dtype)


def rows(m: int = 128, dtype: torch.dtype = torch.bfloat16, width: int = 256) -> Tensor:
    return torch.randn(m, width, device="cuda", dtype=dtype, requires_grad=True)


def gradients(call: Any, model: nn.Module, x: Tensor) -> list[Tensor]:
    """Of the input and of the parameters that train."""
    return list(
        torch.autograd.grad(call(x).float().square().sum(), (x, *(p for p in model.parameters() if p.requires_grad)))
    )


@recipes
def test_the_decision_follows_m(recipe: str) -> None:
    model, every = (
        nn.Linear(4096, 14336, bias=False, device="cuda", dtype=torch.bfloat16),
        fp8fx.recipes.recipe.RECIPES[recipe].gemms,
    )
    large = backend(recipe, "auto").explain(model, rows(8192, width=4096))
    small = backend(recipe, "auto").explain(model, rows(16, width=4096))
    assert [row.gemms for row in large.rewritten] == [every]
    (row,) = small.refused
    assert (
        row.reason is not None
        and row.reason.startswith("FP8 is not worth it, measured: forward 0.")
        and row.reason.endswith("at M=16")
    )
    (forced,) = backend(recipe).explain(model, rows(16, width=4096)).rewritten
    assert forced.gemms == every


@recipes
@pytest.mark.parametrize("m", [1, 33, 100, 128])
def test_gradients_at_any_m_are_as_close_to_high_precision_as_the_simulation(m: int, recipe: str) -> None:
    model, x = mlp(), rows(m)
    exact, simulated = (
        gradients(call, model, x) for call in (model, fp8fx.convert(model, recipe=recipe, executor="simulated"))
    )
    found = gradients(torch.compile(model, backend=backend(recipe), fullgraph=True, dynamic=False), model, x)
    for reference, tensor_cores, simulation in zip(exact, found, simulated, strict=True):
        assert sqnr(reference, tensor_cores) > sqnr(reference, simulation) - 1.0  # dB


@recipes
@pytest.mark.parametrize("m", [32, 128])  # few rows are scaled after the GEMM
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_no_bit(use_reentrant: bool, m: int, recipe: str) -> None:
    model, x = mlp(), rows(m)
    results = []
    for call in (model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)):
        torch._dynamo.reset()
        results.append(gradients(torch.compile(call, backend=backend(recipe), fullgraph=True), model, x))
    assert all(torch.equal(plain, recomputed) for plain, recomputed in zip(*results, strict=True))


@recipes
def test_a_frozen_weight_passes_its_gradient_on(recipe: str) -> None:
    model, x = mlp(), rows()
    model[0].requires_grad_(False)
    exact, found = (
        gradients(call, model, x) for call in (model, torch.compile(model, backend=backend(recipe), fullgraph=True))
    )
    assert model[0].weight.grad is None
    assert all(sqnr(reference, value) > 20 for reference, value in zip(exact, found, strict=True))


@recipes
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_grad_scaler_sees_what_is_not_finite(bad: float, recipe: str) -> None:
    model = mlp(torch.float32)
    compiled, optimizer = torch.compile(model, backend=backend(recipe)), torch.optim.SGD(model.parameters(), lr=1e-4)
    scaler = torch.amp.GradScaler("cuda", init_scale=8.0)

    def step(weight: float) -> bool:
        """Whether it was taken."""
        before = copy.deepcopy(model.state_dict())
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            out = compiled(rows(dtype=torch.float32))
        scaler.scale(out.float()[:-1].sum() + weight * out[-1, -1].float()).backward()
        scaler.step(optimizer)
        scaler.update()
        return any(not torch.equal(p, before[name]) for name, p in model.state_dict().items())

    assert step(1.0)
    assert not step(bad)
    assert scaler.get_scale() == 4.0
    assert step(1.0)


@recipes
def test_a_fused_optimizer_trains_and_a_copy_goes_on_with_the_same_losses(recipe: str) -> None:
    model, batches = mlp(), [rows().detach() for _ in range(20)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    compiled, _ = training.fp8(model, recipe)
    first = training.losses(compiled, optimizer, batches)
    assert first[-1] < 0.8 * first[0]
    copied, its_optimizer = copy.deepcopy((model, optimizer))
    assert training.losses(compiled, optimizer, batches) == training.losses(
        training.fp8(copied, recipe)[0], its_optimizer, batches
    )


@recipes
def test_a_step_needs_no_more_memory_than_in_bf16(recipe: str) -> None:
    """Four SwiGLU blocks behind norms, where activations outweigh what is quantized at once."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.RMSNorm(1024)
            self.gate, self.up, self.down = (
                nn.Linear(*shape, bias=False) for shape in ((1024, 4096), (1024, 4096), (4096, 1024))
            )

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            out: Tensor = x + self.down(F.silu(self.gate(h)) * self.up(h))
            return out

    model, x = nn.Sequential(*(Block() for _ in range(4))).to("cuda", torch.bfloat16), rows(8192, width=1024)
    peaks = []
    for name in ("inductor", backend(recipe)):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=name)
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            compiled(x).sum().backward()
            model.zero_grad()
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] <= peaks[0]


# What tests/training/test_training.py holds a CPU to.


@recipes
def test_gradients_of_micro_batches_add_up_to_the_bit(recipe: str) -> None:
    training.assert_micro_batches_add_up(recipe, "cuda")


@recipes
def test_a_tied_embedding_gets_both_gradients(recipe: str) -> None:
    training.assert_a_tied_embedding_gets_both_gradients(recipe, "cuda")


@recipes
def test_a_block_called_twice_gets_the_sum_of_both_gradients(recipe: str) -> None:
    training.assert_a_shared_block_gets_both_gradients(recipe, "cuda")


@recipes
def test_an_adapter_of_a_frozen_weight(recipe: str) -> None:
    training.assert_an_adapter_of_a_frozen_weight_trains(recipe, "cuda")


@recipes
def test_each_gemm_may_stay_in_high_precision(recipe: str) -> None:
    training.assert_each_gemm_may_stay_in_high_precision(recipe, "cuda")
    assert_chosen_gemms_stay_in_high_precision(recipe, "cuda")


@recipes
def test_the_steps_after_different_updates_compute_with_the_new_weights(recipe: str) -> None:
    training.assert_steps_compute_with_new_weights(list(training.UPDATES), recipe, "cuda")


@recipes
def test_a_copy_and_a_resumed_run_go_on_with_the_same_losses_to_the_bit(recipe: str) -> None:
    training.assert_a_copy_and_a_resumed_run_go_on_with_the_same_losses(recipe, "cuda")


@recipes
def test_autocast_around_the_model_and_inside_it(recipe: str) -> None:
    training.assert_autocast_around_the_model_and_inside_it(recipe, "cuda")


@recipes
def test_dropout_is_active_in_training_only_and_each_mode_is_compiled_once(recipe: str) -> None:
    training.assert_dropout_in_training_only(recipe, "cuda")


@recipes
def test_a_graph_break_changes_no_loss(recipe: str) -> None:
    training.assert_a_graph_break_changes_no_loss(recipe, "cuda")


@recipes
def test_integers_pass_through_untouched(recipe: str) -> None:
    training.assert_integers_pass_through(recipe, "cuda")


@recipes
def test_a_gradient_is_not_differentiated_again(recipe: str) -> None:
    training.assert_a_gradient_is_not_differentiated_again(1, recipe, "cuda")
    training.assert_a_compiled_model_refuses_to_be_differentiated_again(recipe, "cuda")


def test_a_block_compiles_to_the_graphs_that_a_cpu_shows() -> None:
    """Siblings share an FP8 tensor, each tensor has one amax, what is saved is FP8 where the recipe allows."""
    steps = steps_of_a_block("cuda")
    for recipe in steps:
        for check in OF_A_BLOCK:
            check(steps, recipe)
