"""What fast accumulation costs in accuracy: the error of one FP8 GEMM of wgrad, by how many rows it contracts over.

    python -m benchmarks.accumulation

Against float64 over the same FP8 operands, so that only accumulation and the rounding of the result are left; beside
it, what quantizing the operands costs. Writes benchmarks/results/accumulation.json.
"""

from __future__ import annotations

import torch
from tabulate import tabulate
from torch import Tensor

from benchmarks.harness import environment, save
from fp8fx.executors.scaled_mm import ScaledMM
from fp8fx.recipes.quantize import dequantize, quantize
from fp8fx.recipes.recipe import GLOBAL, Gemm

ROWS = (1024, 4096, 16384, 65536, 262144)
OFFSETS = (0.0, 0.5)  # of the operands' mean, in standard deviations: sums that grow lose more than sums that cancel


def error(x: Tensor, reference: Tensor) -> float:
    """Relative, Frobenius norm, in float64."""
    return float((x.double() - reference).norm() / reference.norm())


def errors(rows: int, offset: float, gemm: Gemm, size: int = 512) -> dict[str, float]:
    """The error of a^T (size, rows) @ grad (rows, size) in bfloat16 out, by how it is computed."""
    torch.manual_seed(0)
    a, grad = (torch.randn(size, rows, device="cuda", dtype=torch.bfloat16) + offset for _ in range(2))
    qa, qg = quantize(a, gemm.lhs, 4096), quantize(grad, gemm.rhs, 4096)
    exact = a.double() @ grad.double().t()
    quantized = dequantize(qa, 4096, torch.float64) @ dequantize(qg, 4096, torch.float64).t()

    def run(fast: bool) -> Tensor:
        return ScaledMM().matmul(qa, qg, block=4096, dtype=torch.bfloat16, fast=fast)

    return {
        "quantization": error(quantized, exact),
        "rounding to bfloat16": error(quantized.to(torch.bfloat16), quantized),
        "accumulated exactly": error(run(False), quantized),
        "accumulated fast": error(run(True), quantized),
        "bf16 GEMM": error(a @ grad.t(), exact),
    }


def main() -> None:
    """Prints the table."""
    assert GLOBAL.wgrad is not None
    results = [
        {"rows": rows, "mean": offset, **errors(rows, offset, GLOBAL.wgrad)} for offset in OFFSETS for rows in ROWS
    ]
    print(environment())
    print(tabulate(results, headers="keys", floatfmt=".2e"))
    save("accumulation", {"wgrad": results})


if __name__ == "__main__":
    main()
