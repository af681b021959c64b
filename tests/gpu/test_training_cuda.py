"""Training on FP8 tensor cores: which GEMMs are worth it, GradScaler, checkpointing, frozen weights, fused optimizers, resumed runs."""

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
from fp8fx.hardware import has_fp8_tensor_cores
from fp8fx.numerics import sqnr

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not has_fp8_tensor_cores(torch.device("cuda")), reason="needs a CUDA device of compute capability >= 8.9"),
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
    return list(torch.autograd.grad(call(x).float().square().sum(), (x, *(p for p in model.parameters() if p.requires_grad))))


@recipes
def test_the_decision_follows_m(recipe: str) -> None:
    model, every = nn.Linear(4096, 14336, bias=False, device="cuda", dtype=torch.bfloat16), fp8fx.config.RECIPES[recipe].gemms
    large = backend(recipe, "auto").explain(model, rows(8192, width=4096))
    small = backend(recipe, "auto").explain(model, rows(16, width=4096))
    assert [row.gemms for row in large.rewritten] == [every]
    (row,) = small.refused
    assert row.reason is not None and row.reason.startswith("FP8 is not worth it, measured: forward 0.") and row.reason.endswith("at M=16")
    (forced,) = backend(recipe).explain(model, rows(16, width=4096)).rewritten
    assert forced.gemms == every


@recipes
@pytest.mark.parametrize("m", [1, 33, 100, 128])
def test_gradients_at_any_m_are_as_close_to_high_precision_as_the_simulation(m: int, recipe: str) -> None:
    model, x = mlp(), rows(m)
    exact, simulated = (gradients(call, model, x) for call in (model, fp8fx.convert(model, recipe=recipe, executor="simulated")))
    found = gradients(torch.compile(model, backend=backend(recipe), fullgraph=True, dynamic=False), model, x)
    for reference, tensor_cores, simulation in zip(exact, found, simulated, strict=True):
        assert sqnr(reference, tensor_cores) > sqnr(reference, simulation) - 1.0  # dB


@recipes
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_no_bit(recipe: str, use_reentrant: bool) -> None:
    model, x = mlp(), rows()
    results = []
    for call in (model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)):
        torch._dynamo.reset()
        results.append(gradients(torch.compile(call, backend=backend(recipe), fullgraph=True), model, x))
    assert all(torch.equal(plain, recomputed) for plain, recomputed in zip(*results, strict=True))


@recipes
def test_a_frozen_weight_passes_its_gradient_on(recipe: str) -> None:
    model, x = mlp(), rows()
    model[0].requires_grad_(False)
    exact, found = (gradients(call, model, x) for call in (model, torch.compile(model, backend=backend(recipe), fullgraph=True)))
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


def losses(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Tensor], recipe: str) -> list[float]:
    """The model is to learn the identity."""
    torch._dynamo.reset()
    compiled, found = torch.compile(model, backend=backend(recipe)), []
    for x in batches:
        optimizer.zero_grad()
        loss = F.mse_loss(compiled(x), x)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@recipes
def test_a_fused_optimizer_trains_and_a_copy_goes_on_with_the_same_losses(recipe: str) -> None:
    model, batches = mlp(), [rows().detach() for _ in range(20)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    first = losses(model, optimizer, batches, recipe)
    assert first[-1] < 0.8 * first[0]
    copied, its_optimizer = copy.deepcopy((model, optimizer))
    assert losses(model, optimizer, batches, recipe) == losses(copied, its_optimizer, batches, recipe)


@recipes
def test_a_step_needs_no_more_memory_than_in_bf16(recipe: str) -> None:
    """Four SwiGLU blocks behind norms, where activations outweigh what is quantized at once."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.RMSNorm(1024)
            self.gate, self.up, self.down = (nn.Linear(*shape, bias=False) for shape in ((1024, 4096), (1024, 4096), (4096, 1024)))

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
