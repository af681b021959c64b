"""FP8 tensor cores through `torch._scaled_mm`: compute capability 8.9 and higher.

cuBLASLt wants a row-major (M, K) and a column-major (K, N), with K and N multiples of 16. Whatever does not fit is
padded with zeros here, which changes no value.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8fx.executors import hardware, weight_only
from fp8fx.executors.executor import Executor
from fp8fx.executors.row_major import row_major
from fp8fx.recipes.quantize import Quantized
from fp8fx.torch_internals import scaled_grouped_mm, scaled_mm

__all__ = ["ALIGNMENT", "MAX_ROWS_SCALED_AFTER", "ScaledMM", "scales_after"]

ALIGNMENT = 16
"""What K and N are padded to a multiple of."""


_GROUPED_CAPABILITY = (9, 0)  # torch's grouped GEMM with a scale a row is Hopper's alone


MAX_ROWS_SCALED_AFTER = 64
"""Up to so many rows of a it costs little to multiply the scales of rows after the GEMM.

cuBLASLt's kernels that take a scale a row take half as long again if all the time goes into reading the weight: 13.7 us
instead of 9.1 at 4 x 4096 x 4096 on an H100.
"""


# So many values of the result are as few. cuBLASLt's kernels that take a scale a row take four times as long if few
# tiles sum over many values: 150 us instead of 34 at 256 x 14336 x 4096.
_SMALL = 1 << 20


def _padded(x: Tensor, dim: int) -> Tensor:
    """`x` with zeros appended along `dim` up to a multiple of 16."""
    size = x.shape[dim]
    if isinstance(size, int) and size % ALIGNMENT == 0:
        return x
    # A symbolic size is padded by a symbolic amount, without a guard on its remainder. Bytes, since a zero byte is the
    # FP8 zero and not every kernel takes float8.
    amount = (0, 0) * (x.dim() - 1 - dim) + (0, -size % ALIGNMENT)
    return F.pad(x.view(torch.uint8), amount).view(x.dtype)


def scales_after(m: int | torch.SymInt, n: int | torch.SymInt, never_recomputed: bool) -> bool:
    """Whether scales of rows are multiplied to the (m, n) result of a GEMM, not by the GEMM.

    They are if it has few rows or values and is `never_recomputed`. A symbolic size is judged by the traced call: both
    ways are right for any. They are also if only run time knows the size: torch 2.11 cannot trace a GEMM with a scale a
    row then.
    """
    rows, columns = (x.node.hint if isinstance(x, torch.SymInt) else x for x in (m, n))
    if rows is None or columns is None:
        return True
    return never_recomputed and bool(rows <= MAX_ROWS_SCALED_AFTER or rows * columns <= _SMALL)


def _one_scale_a_row(scale: Tensor, rows: int) -> Tensor:
    """A tensor's scale, or one a row, as (rows, 1), densely."""
    return (scale.expand(rows, 1) if scale.dim() == 0 else scale).contiguous()


def _plus(out: Tensor, bias: Tensor | None) -> Tensor:
    return out if bias is None else out + bias


class ScaledMM(Executor):
    """FP8 tensor cores, by cuBLASLt's GEMMs."""

    name = "scaled_mm"
    tensor_cores = True
    keeps_fp8_weights = True

    def why_unavailable(self, device: torch.device) -> str | None:
        """It runs on NVIDIA's devices of compute capability 8.9 and higher."""
        if hardware.has_fp8_tensor_cores(device):
            return None
        capability = hardware.nvidia_capability(device)
        what = f"device {device}" if capability is None else f"compute capability {'.'.join(map(str, capability))}"
        return f"needs a CUDA device of compute capability 8.9 or higher, found {what}"

    def why_no_groups(self, device: torch.device) -> str | None:
        """It multiplies groups on compute capability 9.0."""
        capability = hardware.nvidia_capability(device)
        if capability == _GROUPED_CAPABILITY:
            return None
        return f"multiplies groups on compute capability 9.0 alone, found {capability}"

    def matmul(
        self,
        lhs: Quantized,
        rhs: Quantized,
        *,
        block: int,
        dtype: torch.dtype,
        bias: Tensor | None = None,
        fast: bool = False,
        never_recomputed: bool = False,
    ) -> Tensor:
        """As `Executor.matmul`. A `lhs` without a scale has a single row, and only the weight is read as FP8.

        `fast` lets the tensor cores accumulate in their own coarser registers (error 1.4e-3 instead of 1.3e-4). If the
        result is computed again, as in backward after checkpointing, nothing is left to a kernel after the GEMM:
        Inductor fuses that with what follows, and then may not round in between.
        """
        if lhs.scale is None:
            return weight_only.matmul(lhs.data, rhs, bias)
        if lhs.scale.dim() == 2 and lhs.scale.shape[1] > 1:
            out = self._sum_of_blocks(lhs, rhs, block, fast, never_recomputed)
            return _plus(out, bias).to(dtype)
        return _matmul(lhs, rhs, dtype, bias, fast, never_recomputed)

    def _sum_of_blocks(self, lhs: Quantized, rhs: Quantized, block: int, fast: bool, never_recomputed: bool) -> Tensor:
        """The product of a `lhs` with several scales a row: one GEMM a block, summed in float32."""
        assert lhs.scale is not None
        out: Tensor | None = None
        for i in range(lhs.scale.shape[1]):
            columns = slice(i * block, (i + 1) * block)
            part = _matmul(
                Quantized(lhs.data[:, columns], lhs.scale[:, i : i + 1]),
                Quantized(rhs.data[:, columns], rhs.scale),
                torch.float32,
                None,
                fast,
                never_recomputed,
            )
            out = part if out is None else out + part
        assert out is not None
        return out

    def grouped_matmul(self, lhs: Quantized, rhs: Quantized, offs: Tensor, *, dtype: torch.dtype) -> Tensor:
        """As `Executor.grouped_matmul`. It accumulates fast, as its rounding to bfloat16 is coarser."""
        assert lhs.scale is not None
        assert rhs.scale is not None
        return scaled_grouped_mm(
            row_major(lhs.data),
            row_major(rhs.data).transpose(-2, -1),
            lhs.scale.squeeze(-1),
            rhs.scale,
            offs=offs,
            out_dtype=dtype,
            use_fast_accum=True,
        )


def _matmul(
    lhs: Quantized, rhs: Quantized, dtype: torch.dtype, bias: Tensor | None, fast: bool, never_recomputed: bool
) -> Tensor:
    """`lhs @ rhs.T + bias` in one GEMM: each operand has a scale, or one a row."""
    scale_a, scale_b = lhs.scale, rhs.scale
    assert scale_a is not None
    assert scale_b is not None
    rows = rhs.data.shape[0]
    a = row_major(_padded(lhs.data, 1))
    b = row_major(_padded(_padded(rhs.data, 1), 0))
    is_padded = b.shape[0] != rows
    by_row = scale_a.dim() == 2 or scale_b.dim() == 2
    if by_row and scales_after(a.shape[0], b.shape[0], never_recomputed):
        unit = torch.ones((), dtype=torch.float32, device=a.device)
        out = scaled_mm(a, b.t(), unit, unit, bias=None, out_dtype=torch.float32, use_fast_accum=fast)
        return _plus(out[:, :rows] * scale_a * scale_b.t(), bias).to(dtype)
    if scale_b.dim() == 2 and is_padded:
        scale_b = F.pad(scale_b, (0, 0, 0, b.shape[0] - rows), value=1.0)
    if by_row:
        scale_a = _one_scale_a_row(scale_a, a.shape[0])
        scale_b = _one_scale_a_row(scale_b, b.shape[0]).t()
    # The epilogue adds a bias of the output's own 16-bit dtype only.
    takes_bias = bias is not None and bias.dtype == dtype != torch.float32 and not is_padded
    fused = bias.contiguous() if bias is not None and takes_bias else None
    out = scaled_mm(a, b.t(), scale_a, scale_b, bias=fused, out_dtype=dtype, use_fast_accum=fast)
    if is_padded:
        out = out[:, :rows]
    return out if takes_bias else _plus(out, bias)
