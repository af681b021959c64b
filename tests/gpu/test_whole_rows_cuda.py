"""Rows in inference on the device: read once, by one kernel each, to the bits that the kernels which loop give."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import fp8fx
from fp8fx.executors.hardware import has_fp8_tensor_cores
from tests.support.numbers import error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not has_fp8_tensor_cores(torch.device("cuda")), reason="needs a CUDA device of compute capability >= 8.9"
    ),
]


class Gated(nn.Module):
    """SwiGLU: rows of 5,120."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(256, 2 * 5120)
        self.down = nn.Linear(5120, 256)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, -1)
        y: Tensor = self.down(F.silu(gate) * up)
        return y


class Beside(nn.Module):
    """The end of FLUX.1's single blocks: rows of 1,024 + 4,096 that are put together."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(1024, 4096)
        self.out = nn.Linear(1024 + 4096, 256)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(torch.cat([x, F.gelu(self.up(x), approximate="tanh")], -1))
        return y


def compiled(model: nn.Module, x: Tensor) -> tuple[Tensor, str]:
    """The output and the code."""
    torch.compiler.reset()
    with torch.no_grad():
        y, (code,) = run_and_get_code(torch.compile(model, backend="fp8", options={"fx_graph_cache": False}), x)
    return y, code


def frozen(create: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("cuda"):
        model = create().bfloat16().requires_grad_(False)
    fp8fx.freeze(model, "rowwise")
    return model


@pytest.mark.parametrize(("create", "features"), [(Gated, 256), (Beside, 1024)])
def test_a_row_is_kept(create: Callable[[], nn.Module], features: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = frozen(create), torch.randn(512, features, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        exact = model(x)
    y, code = compiled(model, x)
    assert "triton_per_" in code
    assert "triton_red_" not in code
    monkeypatch.setattr("fp8fx.lowering.whole_rows", contextlib.nullcontext)
    looped, code = compiled(model, x)
    assert "triton_red_" in code
    assert torch.equal(y, looped)
    assert error(y, exact) < 0.04  # eager rounds between the operations: up to a step of FP8
