"""Attention without the mask, by the device's own kernels: as exact as with it, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fp8fx
from fp8fx import Config
from tests.support.numbers import error

HAS_TENSOR_CORES = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::fp8fx.errors.FP8Warning"),  # no linear is rewritten here
    pytest.mark.skipif(not HAS_TENSOR_CORES, reason="needs a CUDA device of compute capability 8.9 or higher"),
]

MASKS = {
    "comparison": lambda rows, columns: (
        torch.arange(columns, device="cuda") <= torch.arange(rows, device="cuda")[:, None]
    ),
    "-inf": lambda rows, columns: torch.full((rows, columns), -torch.inf, device="cuda", dtype=torch.bfloat16).triu(1),
    "nothing hidden": lambda rows, columns: torch.ones(rows, columns, dtype=torch.bool, device="cuda"),
}


@pytest.mark.parametrize(("queries", "keys"), [(256, 256), (128, 256), (256, 128)])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("name", MASKS)
def test_as_exact_as_with_the_mask(name: str, width: int, queries: int, keys: int) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = MASKS[name](queries, keys)
        mask = mask if mask.dtype == torch.bool else mask.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, mask)

    operands = [torch.randn(2, 4, size, width, device="cuda").bfloat16() for size in (queries, keys, keys)]
    grad = torch.randn_like(operands[0])

    def results(function: object, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in operands]
        y = function(*leaves)  # type: ignore[operator]
        return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(dtype))]

    backend = fp8fx.Backend(Config(profit="never"))
    (row,) = backend.explain(attend, *operands).attention
    assert row.became == ("no mask" if name == "nothing hidden" else "is_causal=True")
    exact = results(attend, torch.float64)
    with_mask = results(attend, torch.bfloat16)
    without = results(torch.compile(attend, backend=backend), torch.bfloat16)
    for found, before, expected in zip(without, with_mask, exact, strict=True):
        assert error(found, expected) < 1.2 * error(before, expected) + 1e-4
