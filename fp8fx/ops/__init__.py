"""torch.ops.fp8fx.*: the FP8 matmuls, one operator of each kind a recipe."""

from fp8fx.ops import grouped_mm, matmul
from fp8fx.ops.matmul import matmul_fp8, op
from fp8fx.ops.operands import DTYPES

__all__ = ["DTYPES", "grouped_mm", "matmul", "matmul_fp8", "op"]
