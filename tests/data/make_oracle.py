"""Writes oracle.pt: outputs and gradients of bitsandbytes' own research ops, which need a CUDA GPU and bitsandbytes
0.49.2.

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


def decided(x: torch.Tensor, target: float, dtype: torch.dtype, block: int) -> bool:
    """Whether no value of x, scaled per tensor or per block, lies within a few float32 ulps of the middle of two grid
    points."""
    grid = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    grid = grid[grid.abs() <= target].unique().to(x.device)
    middles = (grid[1:] + grid[:-1]) / 2
    flat = x.double().flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
    for y in (flat / flat.abs().max() * target, (blocks / blocks.abs().amax(1, keepdim=True) * target).flatten()):
        i = torch.bucketize(y.contiguous(), middles).clamp(1, len(middles) - 1)
        gap = torch.minimum((y - middles[i]).abs(), (y - middles[i - 1]).abs())
        if (gap <= 5e-7 * y.abs()).any():
            return False
    return True


def draw(shape: tuple[int, ...], dtype: torch.dtype, block: int, *formats: tuple[float, torch.dtype]) -> torch.Tensor:
    """Normal values; in float32 none that two roundings of the scale could take to different grid points."""
    while True:
        x = torch.randn(*shape, device="cuda").to(dtype)
        if dtype != torch.float32 or all(
            decided(x, *f, block) for f in formats
        ):  # 16-bit values often lie exactly between two
            return x


def case(leading: tuple[int, ...], k: int, n: int, dtype: torch.dtype) -> dict[str, Any]:
    bsz, bsz2 = block_size(k), block_size(n)
    e4m3, e5m2 = (240.0, torch.float8_e4m3fn), (57344.0, torch.float8_e5m2)
    a, b, grad = (
        draw((*leading, k), dtype, bsz, e4m3),
        draw((k, n), dtype, bsz, e4m3),
        draw((*leading, n), dtype, bsz2, e5m2),
    )
    fw, bw = create_fp8_map(True, 4, 3, 8).cuda(), create_fp8_map(True, 5, 2, 8).cuda()
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
