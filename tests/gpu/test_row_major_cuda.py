"""Operands copied apart are those that a right assembler stores in two layouts, byte for byte."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fp8fx.executors import row_major as module
from fp8fx.executors.hardware import has_fp8_tensor_cores
from fp8fx.recipes.recipe import RECIPES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not has_fp8_tensor_cores(torch.device("cuda")), reason="needs a CUDA device of compute capability >= 8.9"
    ),
]


@pytest.mark.parametrize("mode", [None, "max-autotune-no-cudagraphs"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_copied_apart_a_training_step_is_the_same(
    recipe: str, mode: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.device("cuda"):
        model = nn.Sequential(
            nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.Hardtanh(), nn.Linear(512, 512)
        ).bfloat16()
        x = torch.randn(768, 512, dtype=torch.bfloat16)

    def step() -> list[Tensor]:
        torch._dynamo.reset()
        options = {"recipe": recipe, "profit": "always"} | ({} if mode is None else {"mode": mode})
        out = torch.compile(model, backend="fp8", options=options)(x)
        return [out, *torch.autograd.grad(out.float().square().sum(), list(model.parameters()))]

    values = []
    for own_kernel in (False, True):
        monkeypatch.setattr(module, "_wants_own_kernel", lambda device, own_kernel=own_kernel: own_kernel)
        values.append(step())
    for value, expected in zip(*values, strict=True):
        assert torch.equal(value, expected)
