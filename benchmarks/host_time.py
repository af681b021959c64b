"""What a call costs the host: four blocks of seven linears, one row, compiled, with and without FP8 weights.

    python -m benchmarks.host_time [WIDTH]

On a CPU take a small width, so that the host's part is nearly the whole. Each way runs in this process, one after the
other, in two rounds; the figures are medians of the second, relative to the model in high precision under Inductor.
"""

from __future__ import annotations

import copy
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

import fp8fx

CALLS = 200


class Block(nn.Module):
    """The linears of a block of Llama, without attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, 3 * width, bias=False)
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.o(self.q(h) * self.k(h).sigmoid() + self.v(h))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def _frozen(model: nn.Module) -> nn.Module:
    fp8fx.freeze(model, "rowwise")
    return model


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "high precision, Inductor": torch.compile,
    "frozen, Inductor": lambda model: torch.compile(_frozen(model)),
    "frozen, fp8": lambda model: torch.compile(_frozen(model), backend="fp8"),
    "freeze=True": lambda model: torch.compile(model, backend="fp8", options={"recipe": "rowwise", "freeze": True}),
}


@torch.no_grad()
def host_seconds(way: str, model: nn.Module, x: Tensor) -> float:
    """The median time until a call returns; on a GPU it has launched its kernels by then."""
    torch._dynamo.reset()
    call = WAYS[way](copy.deepcopy(model))
    for _ in range(20):
        call(x)
    spent = []
    for _ in range(CALLS):
        if x.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        call(x)
        spent.append(time.perf_counter() - start)
    return statistics.median(spent)


def main(width: int = 64) -> None:
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    torch.set_num_threads(1)
    model = nn.Sequential(*[Block(width) for _ in range(4)]).to(device, dtype).requires_grad_(False)
    x = torch.randn(1, width, device=device, dtype=dtype)
    times: dict[str, float] = {}
    for _ in range(2):
        times = {way: host_seconds(way, model, x) for way in WAYS}
    base = times["high precision, Inductor"]
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {platform.machine()}"
    print(f"{name}, torch {torch.__version__}, width {width}, 28 weights, {time.strftime('%Y-%m-%d')}")
    print(tabulate([(way, f"{seconds / base:.2f}") for way, seconds in times.items()], ("", "host time of a call")))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
