"""The Triton kernel of weight_only.py, which alone imports this file: fp8fx runs without Triton."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["gemv"]


# The weight's sizes are constants, as they are in a model. The warps stand here, not where it is called: a traced call
# that gives them makes a kernel of its own, which is generated, compiled and loaded anew.
@triton.autotune([triton.Config({}, num_warps=2)], key=[])  # type: ignore[untyped-decorator]
@triton.jit  # type: ignore[untyped-decorator]
def gemv(  # type: ignore[no-untyped-def]
    x,
    weight,
    scale,
    bias,
    out,
    features: tl.constexpr,
    scale_a_row: tl.constexpr,
    block: tl.constexpr,
):
    """`out = (weight * scale) @ x + bias`: (N, features) row-major, (features,) -> (N,).

    A program computes one value of the N.
    """
    n = tl.program_id(0)
    row = weight + n.to(tl.int64) * features
    total = tl.zeros((block,), tl.float32)
    for start in range(0, features, block):
        k = start + tl.arange(0, block)
        if features % block == 0:
            w = tl.load(row + k, eviction_policy="evict_first")
            a = tl.load(x + k, eviction_policy="evict_last")
        else:
            w = tl.load(row + k, mask=k < features, other=0.0)
            a = tl.load(x + k, mask=k < features, other=0.0)
        total += w.to(tl.float32) * a.to(tl.float32)
    y = tl.sum(total, 0) * tl.load(scale + n * scale_a_row)
    if bias is not None:
        y += tl.load(bias + n).to(tl.float32)
    tl.store(out + n, y.to(out.dtype.element_ty))
