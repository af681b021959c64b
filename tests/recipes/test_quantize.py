"""amax -> scale -> cast, and back: nearest grid points, isolated rows, and the same bits from every compiler."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fp8fx.recipes.formats import E4M3, E4M3_FULL, E5M2, Format, grid
from fp8fx.recipes.quantize import Quantized, dequantize, quantize, scale_of, sqnr
from fp8fx.recipes.recipe import Cast

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCKS = [Cast(fmt, "block") for fmt in (E4M3, E5M2)]
CASTS = [*(Cast(fmt, "tensor") for fmt in (E4M3, E5M2)), *BLOCKS, Cast(E5M2, "row"), Cast(E4M3_FULL, "row")]
BLOCK = 64

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
formats = pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)
casts = pytest.mark.parametrize("cast", CASTS, ids=lambda cast: f"{cast.format.name}-{cast.granularity}")
block_casts = pytest.mark.parametrize("cast", BLOCKS, ids=lambda cast: cast.format.name)


def bits(q: Quantized) -> tuple[Tensor, Tensor]:
    """The exact bits of `q`: NaN compares equal, and 0 differs from -0."""
    assert q.scale is not None
    return q.data.contiguous().view(torch.uint8), q.scale.contiguous().view(torch.int32)


def assert_same_bits(q: Quantized, expected: Quantized) -> None:
    for x, y in zip(bits(q), bits(expected), strict=True):
        assert torch.equal(x, y)


def tiles(x: Tensor, cast: Cast) -> list[Tensor]:
    """The pieces of `x` that share a scale, in the order of the scales."""
    if cast.granularity == "tensor":
        return [x]
    return [tile for row in x for tile in row.split(BLOCK if cast.granularity == "block" else row.numel())]


def spread(dtype: torch.dtype, rows: int = 7, features: int = 200) -> Tensor:
    """Rows of very different magnitudes, so that a scale from a neighbour would show."""
    return (torch.randn(rows, features) * torch.logspace(-4, 3, rows)[:, None]).to(dtype)


# What the format can hold of: ordinary numbers, tiny and huge ones, its subnormals.
MAGNITUDES = [
    *[
        (torch.float32, 1.0),
        (torch.float32, 1e-20),
        (torch.float32, 1e30),
        (torch.float32, 1e38),
        (torch.float32, 1e-40),
    ],
    *[(torch.bfloat16, 1.0), (torch.bfloat16, 1e-20), (torch.bfloat16, 1e30), (torch.bfloat16, 1e-39)],
    *[(torch.float16, 1.0), (torch.float16, 2e4), (torch.float16, 2.0**-18)],
]


@casts
@pytest.mark.parametrize(("dtype", "magnitude"), MAGNITUDES)
def test_every_value_lands_on_the_nearest_grid_point(dtype: torch.dtype, magnitude: float, cast: Cast) -> None:
    x = (torch.randn(3, 200).clamp(-3, 3) * magnitude).to(dtype)
    q = quantize(x, cast, BLOCK)
    values = dequantize(q, BLOCK, torch.float32)
    assert q.scale is not None
    points = grid(cast.format).double()
    eps, smallest = torch.finfo(torch.float32).eps, 2.0**-149
    for tile, value, scale in zip(
        tiles(x.double(), cast), tiles(values.double(), cast), q.scale.double().flatten(), strict=True
    ):
        assert scale == torch.tensor(max(float(tile.abs().max()) / cast.format.target, 2.0**-125)).float()
        nearest = (tile.flatten()[:, None] - points * scale).abs().min(1).values
        # Beside an exact tie, float32's rounding of the product may pick the other neighbour.
        assert ((tile - value).abs().flatten() <= nearest + 4 * eps * tile.abs().flatten() + smallest).all()


@casts
@dtypes
def test_the_largest_magnitude_becomes_the_target(dtype: torch.dtype, cast: Cast) -> None:
    q = quantize(spread(dtype), cast, BLOCK)
    assert q.data.dtype == cast.format.dtype
    for tile in tiles(q.data.float(), cast):
        assert tile.abs().max() == cast.format.target


@casts
def test_shapes(cast: Cast) -> None:
    q = quantize(spread(torch.float32), cast, BLOCK)
    assert q.scale is not None
    assert q.data.shape == (7, 200)
    assert q.scale.shape == {"tensor": (), "row": (7, 1), "block": (7, 4)}[cast.granularity]
    assert q.scale.dtype == torch.float32


@block_casts
@dtypes
@pytest.mark.parametrize(
    ("features", "block", "blocks"),
    [(200, 64, 4), (100, 64, 2), (64, 64, 1), (20, 64, 1), (5000, 2048, 3), (5000, 4096, 1)],
)
def test_a_row_alone_gives_the_same_bits(
    features: int, block: int, blocks: int, dtype: torch.dtype, cast: Cast
) -> None:
    x = spread(dtype, 5, features)
    q = quantize(x, cast, block)
    assert q.scale is not None
    assert q.scale.shape == (5, blocks)
    for i in range(5):
        assert_same_bits(quantize(x[i : i + 1], cast, block), Quantized(q.data[i : i + 1], q.scale[i : i + 1]))


@block_casts
def test_a_block_alone_gives_the_same_bits(cast: Cast) -> None:
    x = spread(torch.float32)  # the last block of a row has 8 values
    q = quantize(x, cast, BLOCK)
    assert q.scale is not None
    for i, tile in enumerate(x.split(BLOCK, dim=1)):
        alone = quantize(tile.contiguous(), cast, BLOCK)
        assert_same_bits(alone, Quantized(q.data.split(BLOCK, dim=1)[i], q.scale[:, i : i + 1]))


@formats
def test_a_scale_found_in_another_layout_is_taken(fmt: Format) -> None:
    x, per_tensor = spread(torch.float32), Cast(fmt, "tensor")
    q = quantize(x, per_tensor, BLOCK)
    assert q.scale is not None
    assert_same_bits(quantize(x.t(), per_tensor, BLOCK, q.scale), Quantized(q.data.t(), q.scale))
    assert_same_bits(
        quantize(x, per_tensor, BLOCK, 2 * q.scale),
        Quantized(quantize(x / 2, per_tensor, BLOCK, q.scale).data, 2 * q.scale),
    )


@casts
@dtypes
def test_zeros_stay_zeros(dtype: torch.dtype, cast: Cast) -> None:
    x = spread(dtype)
    if cast.granularity == "tensor":
        x.zero_()
    x[2, 64:128] = 0  # a block
    x[4] = 0  # a row
    q = quantize(x, cast, BLOCK)
    assert q.scale is not None
    assert q.scale.isfinite().all()
    assert (q.scale > 0).all()
    assert (dequantize(q, BLOCK, dtype)[x == 0] == 0).all()


@block_casts
@dtypes
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan], ids=str)
def test_a_non_finite_value_spoils_its_own_block_and_no_other(value: float, dtype: torch.dtype, cast: Cast) -> None:
    x = spread(dtype)
    clean = quantize(x, cast, BLOCK)
    x[3, 70] = value
    q = quantize(x, cast, BLOCK)
    spoilt = torch.zeros(7, 200, dtype=torch.bool)
    spoilt[3, 64:128] = True
    finite = dequantize(q, BLOCK, dtype).isfinite()
    assert torch.equal(finite, ~spoilt)
    assert q.scale is not None
    assert clean.scale is not None
    assert torch.equal(bits(q)[0][~spoilt], bits(clean)[0][~spoilt])
    assert torch.equal(q.scale.isfinite(), ~spoilt[:, ::64])
    assert torch.equal(q.scale[q.scale.isfinite()], clean.scale[q.scale.isfinite()])


@formats
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan], ids=str)
def test_a_non_finite_value_spoils_a_whole_tensor_of_one_scale(value: float, fmt: Format) -> None:
    x = spread(torch.float32)
    x[3, 70] = value
    assert not dequantize(quantize(x, Cast(fmt, "tensor"), BLOCK), BLOCK, torch.float32).isfinite().any()


def hard(dtype: torch.dtype) -> Tensor:
    """Everything that a compiler could treat differently: extremes, zeros, non-finite values, a short last block."""
    x = spread(dtype, 16)
    x[0] = x[0].sign() * torch.finfo(dtype).max
    x[1] *= torch.finfo(dtype).smallest_normal / 16
    x[2] = 0
    x[3, 64:128] = 0
    x[4, 5], x[5, 70], x[6, 199] = math.inf, -math.inf, math.nan
    return x


@pytest.mark.compiles
@dtypes
def test_inductor_gives_the_bits_of_eager(dtype: torch.dtype) -> None:
    def every(x: Tensor, finite: Tensor) -> list[tuple[Tensor, Tensor | None]]:
        # A non-finite value spoils the only scale, so per-tensor casts get the rows without one.
        return [tuple(quantize(finite if cast.granularity == "tensor" else x, cast, BLOCK)) for cast in CASTS]  # type: ignore[misc]

    x = hard(dtype)
    operands = x, x[7:].contiguous()
    # A NaN has many bit patterns: values are compared, with NaN equal to NaN, and the sign of zero counts.
    for eager, compiled in zip(
        every(*operands), torch.compile(every, fullgraph=True, dynamic=False)(*operands), strict=True
    ):
        for value, expected in zip(compiled, eager, strict=True):
            assert value is not None
            assert expected is not None
            assert value.dtype == expected.dtype
            value, expected = value.float(), expected.float()
            assert torch.equal(value.isnan(), expected.isnan())
            assert torch.equal(value.nan_to_num(0).view(torch.int32), expected.nan_to_num(0).view(torch.int32))


@block_casts
@dtypes
def test_quantize_then_dequantize_gives_grid_values_back(dtype: torch.dtype, cast: Cast) -> None:
    points = grid(cast.format)
    x = points[torch.randint(len(points), (5, 200))]
    x[:, ::BLOCK] = cast.format.target  # each block's amax
    powers = 2.0 ** torch.randint(-4, 1, (5, 4))
    x = (x * powers.repeat_interleave(BLOCK, 1)[:, :200]).to(dtype)
    q = quantize(x, cast, BLOCK)
    assert q.scale is not None
    assert torch.equal(q.scale, powers)
    assert torch.equal(dequantize(q, BLOCK, dtype), x)
    assert dequantize(q, BLOCK, dtype).dtype == dtype


def test_dequantize_gives_each_block_its_own_scale() -> None:
    data = torch.ones(2, 200).to(torch.float8_e4m3fn)
    scale = torch.arange(8.0).reshape(2, 4)
    expected = torch.tensor([[i // 64 + 4.0 * row for i in range(200)] for row in range(2)])
    assert torch.equal(dequantize(Quantized(data, scale), 64, torch.float32), expected)
    assert torch.equal(dequantize(Quantized(data, torch.tensor(3.0)), 64, torch.float32), torch.full((2, 200), 3.0))
    assert torch.equal(
        dequantize(Quantized(data, scale[:, 1:2]), 64, torch.float32), torch.tensor([[1.0], [5.0]]).expand(2, 200)
    )


def test_dequantize_without_a_scale_only_casts() -> None:
    x = torch.randn(2, 3)
    assert torch.equal(dequantize(Quantized(x, None), 64, torch.bfloat16), x.bfloat16())


@formats
def test_scale_of(fmt: Format) -> None:
    amax = torch.tensor([fmt.target, fmt.target * 4, 0.0, math.inf, math.nan])
    scale = scale_of(amax, fmt)
    assert scale.dtype == torch.float32
    assert scale[:4].tolist() == [1.0, 4.0, 2.0**-125, math.inf]
    assert scale[4].isnan()


def test_scale_of_is_the_correctly_rounded_quotient() -> None:
    amax = torch.rand(1000)
    expected = [torch.tensor(value / 240, dtype=torch.float64).float().item() for value in amax.double().tolist()]
    assert scale_of(amax, E4M3).tolist() == expected


def test_sqnr_by_hand() -> None:
    assert sqnr(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])) == pytest.approx(20)  # |5| / |0.5|
    assert sqnr(torch.tensor([[3.0], [4.0]]), torch.tensor([[3.0], [-1.0]])) == pytest.approx(0)
    assert sqnr(torch.tensor([3e30, 4e30]), torch.tensor([3e30, 4.5e30])) == pytest.approx(
        20, abs=1e-5
    )  # float32 squares overflow
    assert sqnr(torch.ones(2), torch.ones(2)) == math.inf


@formats
def test_sqnr_of_the_formats(fmt: Format) -> None:
    # Three and two mantissa bits, uniform rounding error: 31.5 and 25.5 dB for normal data, give or take the
    # subnormals.
    x = torch.randn(64, 512)
    value = dequantize(quantize(x, Cast(fmt, "block"), 512), 512, torch.float32)
    assert sqnr(x, value) == pytest.approx({"e4m3": 31.5, "e5m2": 25.5}[fmt.name], abs=0.5)
