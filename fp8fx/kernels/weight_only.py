"""A few rows in their own dtype times an FP8 weight: a matrix-vector product that reads the weight at the memory's speed.

Nothing but the weight is quantized, so that no kernel has to find the activation's scale first. Every program computes a few columns
of the output on its own: there is no second kernel, and a row's sums do not depend on the other rows.
"""

from __future__ import annotations

from torch import Tensor
from torch.library import wrap_triton

from fp8fx.numerics import Quantized

__all__ = ["ROWS", "matmul"]

ROWS = 4
"""The most rows it takes: each multiplies the arithmetic, and tensor cores do not help with so few."""

_COLUMNS = {1: 2, 2: 2, 4: 1}  # of the output, that a program computes, by its rows; with the two below the fastest of
_FEATURES = 1024  # those tried on an H100, over all of Llama-3-8B's linears
_WARPS = 2


def _power_of_two(x: int) -> int:
    """The smallest that is >= x."""
    return 1 << (x - 1).bit_length()


def matmul(x: Tensor, weight: Quantized, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, summed in float32: (M, K), (N, K), (N,) -> (M, N) in x's dtype; CUDA, 1 <= M <= ROWS.

    `weight` has one scale, or one a row (N, 1).
    """
    from fp8fx.kernels.gemv import gemv  # here, not above: it imports Triton, which the CPU does without

    assert weight.scale is not None
    (m, k), n = x.shape, weight.data.shape[0]
    out = x.new_empty(m, n)
    rows = _power_of_two(m) if isinstance(m, int) else ROWS
    columns, features = _COLUMNS[rows], min(_FEATURES, _power_of_two(k))
    wrap_triton(gemv)[(-(-n // columns),)](
        x.contiguous(),
        weight.data.contiguous(),
        weight.scale.contiguous(),
        bias,
        out,
        m,
        columns=n,
        features=k,
        scale_a_column=weight.scale.dim() == 2,
        rows_block=rows,
        columns_block=columns,
        features_block=features,
        num_warps=_WARPS,
    )
    return out
