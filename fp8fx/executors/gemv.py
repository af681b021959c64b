"""The Triton kernel of weight_only.py, which alone imports this file: fp8fx runs without Triton."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["gemv"]


# The weight's sizes are constants, as they are in a model. The warps stand here, not where it is called: a traced call
# that gives them makes a kernel of its own, which is generated, compiled and loaded anew.
@triton.autotune([triton.Config({}, num_warps=4)], key=[])  # type: ignore[untyped-decorator]
@triton.jit  # type: ignore[untyped-decorator]
def gemv(  # type: ignore[no-untyped-def]
    x,
    weight,
    scale,
    bias,
    out,
    outputs: tl.constexpr,
    features: tl.constexpr,
    scale_a_row: tl.constexpr,
    rows: tl.constexpr,
    block: tl.constexpr,
):
    """`out = (weight * scale) @ x + bias`: (outputs, features) row-major, (features,) -> (outputs,).

    A program computes `rows` values of the outputs. What it reads of a row at once is `block` values.
    """
    n = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    is_whole: tl.constexpr = outputs % rows == 0
    in_weight = tl.full((rows,), True, tl.int1) if is_whole else n < outputs
    tile = weight + n[:, None] * features
    total = tl.zeros((rows, block), tl.float32)
    for start in tl.static_range(0, features, block):
        k = start + tl.arange(0, block)
        if is_whole and start + block <= features:
            w = tl.load(tile + k[None, :], eviction_policy="evict_first")
            a = tl.load(x + k, eviction_policy="evict_last")
        else:
            w = tl.load(tile + k[None, :], mask=in_weight[:, None] & (k < features)[None, :], other=0.0)
            a = tl.load(x + k, mask=k < features, other=0.0)
        total += w.to(tl.float32) * a.to(tl.float32)[None, :]
    y = tl.sum(total, 1)
    if scale_a_row:
        y *= tl.load(scale + n, mask=in_weight, other=0.0)
    else:
        y *= tl.load(scale)
    if bias is not None:
        y += tl.load(bias + n, mask=in_weight, other=0.0).to(tl.float32)
    tl.store(out + n, y.to(out.dtype.element_ty), mask=in_weight)
