"""What the rewrite itself costs: `convert` on a graph of 100, 1,000 and 10,000 linears, as time per linear.

    python -m benchmarks.convert_cost [--check]

`--check` exits with an error where the time per linear grows by more than 1.3x from 1,000 to 10,000.
"""

from __future__ import annotations

import argparse
import gc
import time

import torch
from tabulate import tabulate
from torch import Tensor, fx, nn

import fp8fx

SIZES = (100, 1_000, 10_000)
ALLOWED_GROWTH = 1.3


class Stack(nn.Module):
    """Linears, each with an activation behind it."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16, device="meta") for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return x


def seconds_per_linear(count: int, repeats: int) -> float:
    """The least CPU time of `repeats` converts, over `count`: other load on the machine only ever adds."""
    gm = fx.symbolic_trace(Stack(count))
    times = []
    for _ in range(repeats):
        gc.collect()
        start = time.process_time()
        new = fp8fx.convert(gm)
        times.append(time.process_time() - start)
        assert len(new.meta["fp8fx_report"].rewritten) == count
    return min(times) / count


def measure() -> dict[int, float]:
    """Seconds per linear by graph size."""
    seconds_per_linear(SIZES[0], 1)  # imports and caches
    return {count: seconds_per_linear(count, 5) for count in SIZES}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    cost = measure()
    growth = cost[SIZES[-1]] / cost[SIZES[-2]]
    print(f"torch {torch.__version__}")
    rows = [(n, f"{cost[n] * 1e6:.0f}", f"{cost[n] / cost[SIZES[-2]]:.2f}") for n in SIZES]
    print(tabulate(rows, ("linears", "us a linear", f"against {SIZES[-2]:,}")))
    if check and growth > ALLOWED_GROWTH:
        raise SystemExit(f"time per linear grew {growth:.2f}x from {SIZES[-2]:,} to {SIZES[-1]:,}; at most {ALLOWED_GROWTH} is allowed")


if __name__ == "__main__":
    main()
