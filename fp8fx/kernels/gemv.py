"""The Triton kernel of weight_only.py, which alone imports this file: fp8fx runs without Triton."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["gemv"]


# The weight's sizes are constants, as they are in a model.
@triton.jit  # type: ignore[untyped-decorator]
def gemv(  # type: ignore[no-untyped-def]
    x,
    weight,
    scale,
    bias,
    out,
    columns: tl.constexpr,
    features: tl.constexpr,
    scale_a_column: tl.constexpr,
    columns_block: tl.constexpr,
    features_block: tl.constexpr,
):
    """`out = (weight * scale) @ x + bias`: (columns, features) row-major, (features,) -> (columns,)."""
    n = tl.program_id(0) * columns_block + tl.arange(0, columns_block)
    k = tl.arange(0, features_block)
    inside = n < columns
    rows = weight + n[:, None].to(tl.int64) * features
    total = tl.zeros((columns_block, features_block), tl.float32)
    for start in range(0, features, features_block):
        if features % features_block == 0 and columns % columns_block == 0:
            w, a = tl.load(rows + (start + k)[None, :]), tl.load(x + start + k)
        else:
            w = tl.load(rows + (start + k)[None, :], mask=inside[:, None] & (start + k < features)[None, :], other=0.0)
            a = tl.load(x + start + k, mask=start + k < features, other=0.0)
        total += w.to(tl.float32) * a.to(tl.float32)[None, :]
    y = tl.sum(total, 1)
    y *= tl.load(scale + n, mask=inside, other=0.0) if scale_a_column else tl.load(scale)
    if bias is not None:
        y += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + n, y.to(out.dtype.element_ty), mask=inside)
