"""Writes oracle.pt: outputs and gradients of bitsandbytes' own research ops, which need a CUDA GPU and bitsandbytes 0.49.2.

    python tests/data/make_oracle.py [OUTPUT]

Each case holds a, b, grad and, for both ops, out, grad_a and grad_b, all on the CPU.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from bitsandbytes.functional import create_fp8_map
from bitsandbytes.research import matmul_fp8_global, matmul_fp8_mixed

LADDER = (64, 128, 256, 512, 1024, 2048, 4096)
SHAPES: list[tuple[tuple[int, ...], int, int]] = [  # leading dimensions, K, N
    ((8,), 64, 64),
    ((16,), 128, 64),
    ((4,), 512, 64),
    ((2, 5), 256, 64),
    ((3, 7), 128, 128),
    ((6,), 100, 48),
    ((5,), 200, 64),
    ((2, 4), 96, 80),
    ((3, 3), 320, 64),
]


def block_size(features: int) -> int:
    return next((size for size in LADDER if size >= features), LADDER[-1])


def case(leading: tuple[int, ...], k: int, n: int, dtype: torch.dtype) -> dict[str, Any]:
    a, b, grad = (torch.randn(*shape, device="cuda").to(dtype) for shape in ((*leading, k), (k, n), (*leading, n)))
    fw, bw = create_fp8_map(True, 4, 3, 8).cuda(), create_fp8_map(True, 5, 2, 8).cuda()
    bsz, bsz2 = block_size(k), block_size(n)
    result: dict[str, Any] = {"bsz": bsz, "bsz2": bsz2, "a": a.cpu(), "b": b.cpu(), "grad": grad.cpu()}
    for name, function in (("mixed", matmul_fp8_mixed), ("global", matmul_fp8_global)):
        x, w = a.clone().requires_grad_(), b.clone().requires_grad_()
        out = function(x, w, fw_code=fw, bw_code=bw, bsz=bsz, bsz2=bsz2)
        out.backward(grad)
        assert x.grad is not None and w.grad is not None
        result[name] = {"out": out.detach().cpu(), "grad_a": x.grad.cpu(), "grad_b": w.grad.cpu()}
    return result


def main(path: Path) -> None:
    torch.manual_seed(0)
    cases = [case(*shape, dtype) for shape in SHAPES for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    made_by = f"bitsandbytes {bitsandbytes.__version__}, torch {torch.__version__}, {torch.cuda.get_device_name()}"
    torch.save({"made_by": made_by, "cases": cases}, path)
    print(f"{path}: {len(cases)} cases, {path.stat().st_size / 2**20:.1f} MiB, {made_by}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("oracle.pt"))
