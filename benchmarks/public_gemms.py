"""torch's public FP8 GEMMs against the private operators that we call: the host's and the device's time, eager and compiled.

    python -m benchmarks.public_gemms

Prints microseconds of a call, and what the private operator takes of the public one's time. fp8fx calls the private ones as long as
DTensor has a sharding rule for `_scaled_mm` alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor
from torch.nn.functional import ScalingType

from benchmarks.harness import environment, milliseconds

E4M3 = torch.float8_e4m3fn
EXPERTS = 8


def private(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor) -> Tensor:
    return torch._scaled_mm(a, b.t(), scale_a, scale_b, out_dtype=torch.bfloat16, use_fast_accum=True)


def public(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor) -> Tensor:
    kind = ScalingType.TensorWise if scale_a.dim() == 0 else ScalingType.RowWise
    return F.scaled_mm(a, b.t(), scale_a, kind, scale_b, kind, output_dtype=torch.bfloat16, use_fast_accum=True)


def private_grouped(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, offs: Tensor) -> Tensor:
    b = b.transpose(-2, -1)
    return torch._scaled_grouped_mm(a, b, scale_a, scale_b, offs=offs, out_dtype=torch.bfloat16, use_fast_accum=True)


def public_grouped(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, offs: Tensor) -> Tensor:
    kind, b = ScalingType.RowWise, b.transpose(-2, -1)
    return F.scaled_grouped_mm(a, b, scale_a, kind, scale_b, kind, offs=offs, output_dtype=torch.bfloat16, use_fast_accum=True)


def operands(m: int, k: int, n: int, kind: str) -> tuple[Tensor, ...]:
    a = torch.randn(m, k).to(E4M3)
    if kind == "grouped":
        b = torch.randn(EXPERTS, n, k).to(E4M3)
        offs = torch.arange(1, EXPERTS + 1, dtype=torch.int32) * (m // EXPERTS)
        return a, b, torch.rand(m), torch.rand(EXPERTS, n), offs
    b = torch.randn(n, k).to(E4M3)
    return (a, b, torch.rand(()), torch.rand(())) if kind == "tensor" else (a, b, torch.rand(m, 1), torch.rand(1, n))


def host_microseconds(call: Callable[[], Any], calls: int = 200) -> float:
    """Of the host alone, for a call whose kernels are shorter than that."""
    times = []
    for _ in range(7):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(times)


@torch.no_grad()
def main() -> None:
    print(environment())
    rows: list[list[Any]] = []
    with torch.device("cuda"):
        for kind in ("tensor", "row", "grouped"):
            pair = (private_grouped, public_grouped) if kind == "grouped" else (private, public)
            for size in ((64, 256, 256), (4096, 4096, 4096)):
                inputs = operands(*size, kind)
                for how in ("eager", "compiled"):
                    calls = [function if how == "eager" else torch.compile(function, fullgraph=True) for function in pair]
                    results = [call(*inputs) for call in calls]
                    small = size[0] == 64
                    measure = host_microseconds if small else lambda call: 1e3 * milliseconds(call)
                    times = [measure(lambda call=call, inputs=inputs: call(*inputs)) for call in calls]
                    what = "host" if small else "device"
                    rows.append([kind, " x ".join(map(str, size)), how, what, *times, times[0] / times[1], torch.equal(*results)])
    headers = ("scales", "M x K x N", "how", "time", "private us", "public us", "private / public", "same bits")
    print(tabulate(rows, headers, floatfmt=".2f"))


if __name__ == "__main__":
    main()
