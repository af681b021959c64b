"""The contract of the matmul ops, in plain torch and float64, and what a test of them needs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fp8fx.ops.matmul import op
from fp8fx.ops.operands import DTYPES
from fp8fx.recipes.quantize import quantize
from fp8fx.recipes.recipe import RECIPES as DEFINITIONS

RECIPES = ("mixed", "global", "rowwise")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# Rounding to the dtype, of operands and of the result.
ROUNDING = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
recipes = pytest.mark.parametrize("recipe", RECIPES)
Grads = tuple[Tensor | None, ...]


# The contract's table, in plain torch and float64.


def cast(x: Tensor, dtype: torch.dtype, target: int | None = None) -> Tensor:
    """`x` after a trip through FP8 with one scale: amax goes to 240 (E4M3) or 57344 (E5M2)."""
    scale = (x.abs().max() / (target or {E4M3: 240, E5M2: 57344}[dtype])).float()
    # 16-bit values often lie between two grid points: the product is rounded to float32 first, which breaks the tie.
    return (x.float() * (1 / scale.double()).float()).to(dtype).double() * scale


def cast_blocks(x: Tensor, dtype: torch.dtype, size: int) -> Tensor:
    """The same with one scale per block of a row; 4096 is the whole row."""
    pieces = x.split(x.shape[1] if size == 4096 else size, dim=1)
    return torch.cat([torch.stack([cast(row, dtype) for row in piece]) for piece in pieces], dim=1)


def ladder(features: int) -> int:
    return min(max(64, 2 ** math.ceil(math.log2(features))), 4096)


def error(x: Tensor, reference: Tensor) -> float:
    x, reference = x.detach().double(), reference.detach().double()
    return float((x - reference).norm() / reference.norm())


CASES = [  # leading dimensions, K, N, bsz, bsz2
    ((), 64, 64, -1, -1),
    ((5,), 64, 48, -1, -1),
    ((2, 3), 100, 50, -1, -1),
    ((2, 1, 3), 33, 17, -1, -1),
    ((1,), 1, 1, -1, -1),
    ((4,), 5000, 20, -1, -1),
    ((3,), 20, 4100, -1, -1),
    ((5,), 200, 150, 64, 64),
    ((5,), 96, 300, 64, 128),
    ((2,), 5000, 20, 2048, -1),
    ((5,), 100, 50, 4096, 512),
]


# What is kept for backward.


def saved(recipe: str, need_a: bool, need_b: bool) -> tuple[list[str], Grads, Grads]:
    """What is saved when only some operands need a gradient; their gradients, and those of a run where both do."""
    operands, grad = {"a": torch.randn(5, 100), "b": torch.randn(100, 50)}, torch.randn(5, 50)
    pointers = {x.data_ptr(): name for name, x in operands.items()}
    kept: list[str] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(pointers.get(x.data_ptr(), f"{x.dtype} {tuple(x.shape)}"))
        return x

    def grads(*need: bool) -> Grads:
        leaves = [x.detach().requires_grad_(n) for x, n in zip(operands.values(), need, strict=True)]
        out = op(recipe)(*leaves)
        assert out.requires_grad == any(need)
        if any(need):
            out.backward(grad)
        return tuple(x.grad for x in leaves)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        some = grads(need_a, need_b)
    return sorted(kept), some, grads(True, True)


A, B = torch.ones(5, 100), torch.ones(100, 50)


# A weight that is FP8 already.


def frozen_weight(recipe: str, b: Tensor) -> dict[str, Tensor]:
    """b (K, N) as the recipe's forward has it: data and scale."""
    forward = DEFINITIONS[recipe].forward
    assert forward is not None
    data, scale = quantize(b.t(), forward.rhs, 4096)
    assert scale is not None
    return {"b": data.contiguous().t(), "b_scale": scale}
