"""One row in its own dtype times an FP8 weight: a matrix-vector product that reads the weight at the memory's speed.

Nothing but the weight is quantized, so that no kernel has to find the activation's scale first. From two rows on the
tensor cores are faster, since to quantize a few rows takes no longer than to quantize one.
"""

from __future__ import annotations

from torch import Tensor
from torch.library import wrap_triton

from fp8fx.recipes.quantize import Quantized

__all__ = ["ROWS", "matmul"]

ROWS = 1
"""How many rows it takes."""


# With four warps the fastest of those tried on an H200 for Llama-3-8B's linears of 4096 features. A row of another
# length is read in parts without a rest if it has such: a rest is read behind a mask.
_ROWS = 4  # of a weight that a program reads side by side
_BLOCKS = 4096, 2048, 1024  # values of a row that it reads at once


def _block(features: int) -> int:
    """The values of a row of so many features that a program reads at once."""
    whole = (block for block in _BLOCKS if features % block == 0)
    return next(whole, min(_BLOCKS[0], 1 << (features - 1).bit_length()))


def matmul(x: Tensor, weight: Quantized, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, summed in float32: (1, K), (N, K), (N,) -> (1, N) in x's dtype, on CUDA.

    `weight` has one scale, or one a row (N, 1).
    """
    from fp8fx.executors.gemv import gemv  # here, not above: it imports Triton, which the CPU does without

    assert weight.scale is not None
    n, k = weight.data.shape
    out = x.new_empty(x.shape[0], n)  # one row, which a symbolic size does not know
    wrap_triton(gemv)[(-(-n // _ROWS),)](
        x.contiguous(),
        weight.data.contiguous(),
        weight.scale.reshape(-1).contiguous(),  # a constant of no dimension would reach Triton as a number
        None if bias is None else bias.contiguous(),
        out,
        outputs=n,
        features=k,
        scale_a_row=weight.scale.dim() == 2,
        rows=_ROWS,
        block=_block(k),
    )
    return out
