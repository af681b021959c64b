"""The Triton kernel of weight_only.py, which alone imports this file: fp8fx runs without Triton."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["gemv"]


# The weight's sizes are constants, as they are in a model; only the rows may change from call to call.
@triton.jit  # type: ignore[untyped-decorator]
def gemv(  # type: ignore[no-untyped-def]
    x,
    weight,
    scale,
    bias,
    out,
    rows,
    columns: tl.constexpr,
    features: tl.constexpr,
    scale_a_column: tl.constexpr,
    rows_block: tl.constexpr,
    columns_block: tl.constexpr,
    features_block: tl.constexpr,
):
    """`out = x @ (weight * scale).T + bias`: (rows, features), (columns, features) -> (rows, columns), all of them row-major."""
    m = tl.arange(0, rows_block)
    n = tl.program_id(0) * columns_block + tl.arange(0, columns_block)
    k = tl.arange(0, features_block)
    total = tl.zeros((rows_block, columns_block, features_block), tl.float32)
    for start in range(0, features, features_block):
        inside = start + k < features
        w_at = weight + n[:, None].to(tl.int64) * features + (start + k)[None, :]
        x_at = x + m[:, None] * features + (start + k)[None, :]
        w = tl.load(w_at, mask=(n < columns)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        a = tl.load(x_at, mask=(m < rows)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += a[:, None, :] * w[None, :, :]
    y = tl.sum(total, 2)
    if scale_a_column:
        y *= tl.load(scale + n, mask=n < columns, other=0.0)[None, :]
    else:
        y *= tl.load(scale)
    if bias is not None:
        y += tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    tl.store(out + m[:, None] * columns + n[None, :], y.to(out.dtype.element_ty), mask=(m < rows)[:, None] & (n < columns)[None, :])
