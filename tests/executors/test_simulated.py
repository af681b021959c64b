"""Dequantize, then multiply in the dtype asked for."""

from __future__ import annotations

import pytest
import torch

from fp8fx.executors.executor import Executor
from fp8fx.executors.registry import EXECUTORS
from fp8fx.executors.simulated import Simulated
from fp8fx.recipes.formats import E4M3, E5M2
from fp8fx.recipes.quantize import Quantized, dequantize, quantize
from fp8fx.recipes.recipe import Cast

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def test_it_is_the_executor_of_that_name_and_quantizes_as_numerics_does() -> None:
    assert type(EXECUTORS["simulated"]) is Simulated
    assert Simulated.quantize is Executor.quantize


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("block", "features"), [(64, 200), (128, 100), (4096, 100)])
def test_it_multiplies_the_dequantized_values(block: int, features: int, dtype: torch.dtype) -> None:
    a, b = torch.randn(5, features).to(dtype), torch.randn(7, features).to(dtype)
    qa, qb = quantize(a, Cast(E5M2, "block"), block), quantize(b, Cast(E4M3, "tensor"), block)
    out = Simulated().matmul(qa, qb, block=block, dtype=dtype)
    assert (out.dtype, out.shape) == (dtype, (5, 7))
    assert torch.equal(out, dequantize(qa, block, dtype) @ dequantize(qb, block, dtype).t())


def test_by_hand() -> None:
    lhs = Quantized(torch.tensor([[1.0, 2.0], [3.0, 4.0]]).to(torch.float8_e4m3fn), torch.tensor([[2.0], [10.0]]))
    rhs = Quantized(torch.tensor([[1.0, -1.0], [0.5, 8.0], [0.0, 1.0]]).to(torch.float8_e5m2), torch.tensor(0.5))
    bias = torch.tensor([1.0, 2.0, 3.0])
    out = Simulated().matmul(lhs, rhs, block=64, dtype=torch.float32, bias=bias)
    assert out.tolist() == [[0.0, 18.5, 5.0], [-4.0, 169.5, 23.0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fast_means_nothing(dtype: torch.dtype) -> None:
    q = quantize(torch.randn(5, 64), Cast(E4M3, "tensor"), 64)
    assert torch.equal(*(Simulated().matmul(q, q, block=64, dtype=dtype, fast=fast) for fast in (False, True)))
