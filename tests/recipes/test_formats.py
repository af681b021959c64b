"""The grids, the ladder of block sizes, and bitsandbytes' code tables beside them."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import create_fp8_map
from torch import Tensor

from fp8fx.errors import BlockSizeError, FP8Error, ShapeError
from fp8fx.recipes.formats import E4M3, E5M2, LADDER, Format, block_size, blocks_per_row, check_block_size, grid

# (format, exponent bits, mantissa bits)
FORMATS = pytest.mark.parametrize(("fmt", "exponent", "mantissa"), [(E4M3, 4, 3), (E5M2, 5, 2)], ids=["e4m3", "e5m2"])


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        *[
            (1, 64),
            (63, 64),
            (64, 64),
            (65, 128),
            (127, 128),
            (128, 128),
            (129, 256),
            (255, 256),
            (256, 256),
            (257, 512),
        ],
        *[(511, 512), (512, 512), (513, 1024), (1023, 1024), (1024, 1024), (1025, 2048), (2047, 2048), (2048, 2048)],
        *[(2049, 4096), (4095, 4096), (4096, 4096), (4097, 4096), (100_000, 4096)],
    ],
)
def test_block_size_is_the_smallest_of_the_ladder_that_holds_the_features(features: int, expected: int) -> None:
    assert block_size(features) == expected


@pytest.mark.parametrize("features", [0, -1])
def test_block_size_of_no_features_is_refused(features: int) -> None:
    with pytest.raises(ShapeError, match=rf"block_size got {features} features, expected at least 1"):
        block_size(features)


def test_ladder_is_that_of_bitsandbytes_cuda_kernels() -> None:
    assert LADDER == (64, 128, 256, 512, 1024, 2048, 4096)


@pytest.mark.parametrize("size", LADDER)
def test_check_block_size_keeps_a_size_of_the_ladder(size: int) -> None:
    assert check_block_size("bsz", size, features=100) == size


def test_check_block_size_derives_minus_one() -> None:
    assert check_block_size("bsz", -1, features=100) == 128


@pytest.mark.parametrize("size", [-2, 0, 1, 63, 100, 8192])
def test_check_block_size_names_the_valid_ones(size: int) -> None:
    with pytest.raises(
        BlockSizeError, match=rf"bsz2={size} .*expected one of \(64, 128, 256, 512, 1024, 2048, 4096\), or -1"
    ) as error:
        check_block_size("bsz2", size, features=100)
    assert isinstance(error.value, FP8Error)
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize(
    ("features", "size", "expected"),
    [
        *[(1, 64, 1), (64, 64, 1), (65, 64, 2), (200, 64, 4), (5000, 2048, 3)],
        *[(4096, 4096, 1), (4097, 4096, 1), (100_000, 4096, 1)],  # the top of the ladder is the whole row
    ],
)
def test_blocks_per_row(features: int, size: int, expected: int) -> None:
    assert blocks_per_row(features, size) == expected


@FORMATS
def test_grid_is_every_value_up_to_the_target(fmt: Format, exponent: int, mantissa: int) -> None:
    values = grid(fmt)
    bias = 2 ** (exponent - 1) - 1
    positive = {m * 2.0 ** (1 - bias - mantissa) for m in range(2**mantissa)}  # subnormals
    positive |= {(1 + m / 2**mantissa) * 2.0 ** (e - bias) for e in range(1, 2**exponent) for m in range(2**mantissa)}
    expected = sorted(v for p in positive if p <= fmt.target for v in {p, -p})
    assert values.dtype == torch.float32
    assert values.tolist() == expected


def test_targets_are_those_of_bitsandbytes() -> None:
    assert (E4M3.target, E4M3.dtype) == (240.0, torch.float8_e4m3fn)
    assert (E5M2.target, E5M2.dtype) == (57344.0, torch.float8_e5m2)
    assert E4M3.target <= torch.finfo(E4M3.dtype).max
    assert E5M2.target == torch.finfo(E5M2.dtype).max


def between(values: Tensor, low: float, high: float) -> Tensor:
    return values[(values.abs() >= low) & (values.abs() < high)]


@FORMATS
def test_grid_is_bitsandbytes_code_table(fmt: Format, exponent: int, mantissa: int) -> None:
    table = create_fp8_map(True, exponent, mantissa, 8).double().unique() * fmt.target
    values = grid(fmt).double()
    normal = torch.finfo(fmt.dtype).smallest_normal

    def same(x: Tensor, y: Tensor) -> bool:
        return x.shape == y.shape and torch.allclose(x, y, rtol=1e-6, atol=0)

    # Every normal number is in both. (The table is float32 divided by its maximum: equal up to that rounding.)
    assert same(between(table, normal, float("inf")), between(values, normal, float("inf")))
    # The binade below holds all of the grid's subnormals that are in it, and as many again between them: the table is
    # still normal there.
    table_binade, grid_binade = between(table, normal / 2, normal), between(values, normal / 2, normal)
    assert len(table_binade) == 2 * len(grid_binade)
    shared = torch.isclose(table_binade[:, None], grid_binade, rtol=1e-6, atol=0).any(1)
    assert same(table_binade[shared], grid_binade)
    # Under it nothing but zero is shared: the table jumps to steps an eighth of the grid's.
    steps = torch.arange(1 - 2**mantissa, 2**mantissa, dtype=torch.float64)
    assert same(between(table, 0, normal / 2), steps * normal / 2**mantissa / 8)
    assert same(between(values, 0, normal / 2), steps[steps.abs() < 2 ** (mantissa - 1)] * normal / 2**mantissa)
