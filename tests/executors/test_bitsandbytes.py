"""bitsandbytes' own values, block cut included."""

from __future__ import annotations

import math

import pytest
import torch
from bitsandbytes.functional import create_fp8_map, dequantize_blockwise, quantize_blockwise
from torch import Tensor

import fp8fx
from fp8fx.executors import bitsandbytes
from fp8fx.executors.bitsandbytes import BitsAndBytes
from fp8fx.executors.registry import EXECUTORS
from fp8fx.executors.simulated import Simulated
from fp8fx.recipes.formats import E4M3, E5M2, Format
from fp8fx.recipes.quantize import dequantize, quantize, sqnr
from fp8fx.recipes.recipe import Cast

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BITS = {"e4m3": (4, 3), "e5m2": (5, 2)}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
formats = pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)


def code(fmt: Format) -> Tensor:
    return create_fp8_map(True, *BITS[fmt.name], 8)


def values(x: Tensor, cast: Cast, block: int = 64) -> Tensor:
    q = BitsAndBytes().quantize(x, cast, block)
    assert q.scale is None
    assert (q.data.dtype, q.data.shape) == (x.dtype, x.shape)
    return q.data


def test_it_is_the_executor_of_that_name_and_multiplies_as_simulated_does() -> None:
    assert type(EXECUTORS["bitsandbytes"]) is BitsAndBytes
    assert BitsAndBytes.matmul is Simulated.matmul


@formats
@dtypes
@pytest.mark.parametrize(("features", "block"), [(64, 64), (100, 128), (200, 64), (33, 64)])
def test_blocks_are_literally_bitsandbytes_ones(features: int, block: int, dtype: torch.dtype, fmt: Format) -> None:
    x = torch.randn(5, features).to(dtype)
    codes, state = quantize_blockwise(x, code=code(fmt), blocksize=block)
    assert torch.equal(values(x, Cast(fmt, "block"), block), dequantize_blockwise(codes, state, blocksize=block))


@formats
def test_blocks_are_cut_from_the_flattened_tensor(fmt: Format) -> None:
    x = torch.randn(4, 96)  # 6 blocks of 64, some across two rows
    expected = values(x.reshape(6, 64), Cast(fmt, "block")).reshape(4, 96)
    assert torch.equal(values(x, Cast(fmt, "block")), expected)
    assert not torch.equal(values(x[1:2], Cast(fmt, "block")), expected[1:2])


@formats
def test_a_strided_tensor_is_cut_in_its_logical_order(fmt: Format) -> None:
    x = torch.randn(96, 4).t()
    assert torch.equal(values(x, Cast(fmt, "block")), values(x.contiguous(), Cast(fmt, "block")))


@formats
@dtypes
def test_one_scale_takes_the_nearest_entry_of_the_code_table(dtype: torch.dtype, fmt: Format) -> None:
    x = torch.randn(5, 100).to(dtype)
    points = code(fmt).double() * x.double().abs().max()
    result = values(x, Cast(fmt, "tensor")).double().flatten()
    x = x.double().flatten()
    rounding = torch.finfo(dtype).eps * x.abs()
    assert ((result[:, None] - points).abs().min(1).values <= rounding).all()
    assert ((result - x).abs() <= (x[:, None] - points).abs().min(1).values + rounding).all()


@pytest.mark.parametrize("granularity", ["tensor", "block"])
@formats
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_a_non_finite_value_is_not_swallowed(value: float, fmt: Format, granularity: str) -> None:
    x = torch.randn(4, 64)
    x[2, 5] = value
    result = values(x, Cast(fmt, granularity))  # type: ignore[arg-type]
    assert not result[2, 5].isfinite()
    if granularity == "block":  # the rows are its blocks
        clean = values(x[[0, 1, 3]], Cast(fmt, "block"))
        assert torch.equal(result[[0, 1, 3]], clean)


@pytest.mark.parametrize("granularity", ["tensor", "block"])
@formats
def test_zeros_stay_zeros(fmt: Format, granularity: str) -> None:
    assert (values(torch.zeros(4, 64), Cast(fmt, granularity)) == 0).all()  # type: ignore[arg-type]


@pytest.mark.parametrize("granularity", ["tensor", "block"])
@formats
@pytest.mark.parametrize("features", [64, 128, 512])
def test_it_is_close_to_the_float8_cast_on_the_ladder(features: int, fmt: Format, granularity: str) -> None:
    x, cast = torch.randn(16, features), Cast(fmt, granularity)  # type: ignore[arg-type]
    expected = dequantize(quantize(x, cast, features), features, torch.float32)
    result = values(x, cast, features)
    # bitsandbytes' blockwise CPU kernel rounds a few values to the other neighbour, a step of the grid away.
    assert (result - expected).norm() / expected.norm() <= {"tensor": 1e-6, "block": 2e-3}[granularity]


@pytest.mark.compiles
@pytest.mark.parametrize("recipe", ["mixed", "global", "rowwise"])
def test_the_first_call_may_be_one_that_is_compiled(recipe: str) -> None:
    bitsandbytes._values.cache_clear()
    torch._dynamo.reset()
    linear, x = torch.nn.Linear(64, 96), torch.randn(8, 64)
    with torch._inductor.config.patch(force_disable_caches=True):
        compiled = torch.compile(linear, backend="fp8", options={"recipe": recipe, "executor": "bitsandbytes"})(x)
    eager = fp8fx.convert(linear, recipe=recipe, executor="bitsandbytes")(x)
    assert type(eager) is Tensor
    assert sqnr(eager, compiled) > 60
