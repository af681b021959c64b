"""What the rewrite itself costs: `convert` on a graph of 100, 1,000 and 10,000 linears, as time per linear.

    python -m benchmarks.convert_cost [--check]
    python -m benchmarks.convert_cost --zoo T5 Swinv2 ...

`--check` exits with an error where the time per linear grows by more than 1.3x from 1,000 to 10,000. `--zoo` tells of
these architectures which part of the time to their first result through Inductor, with empty caches and on the CPU, the
rewrite takes.
"""

from __future__ import annotations

import argparse
import gc
import time
from typing import Any
from unittest import mock

import torch
from tabulate import tabulate
from torch import Tensor, fx, nn
from torch._inductor.utils import fresh_cache

import fp8fx
from fp8fx import backend

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


def share(name: str) -> tuple[int, float, float]:
    """Of an architecture of tests/zoo in inference: the nodes of its largest graph, seconds of the rewrite, seconds of
    the first call."""
    from tests.zoo.models import ZOO

    built, rewritten, nodes, spent = ZOO[name](), backend.rewritten, [0], [0.0]

    def timed(gm: fx.GraphModule, *args: Any) -> Any:
        start = time.perf_counter()
        found = rewritten(gm, *args)
        spent.append(time.perf_counter() - start)
        nodes.append(len(gm.graph.nodes))
        return found

    torch._dynamo.reset()
    model = built.model.to(built.dtype).eval()
    inputs = {key: x.to(built.dtype) if x.is_floating_point() else x for key, x in built.inputs.items()}
    call = torch.compile(model, backend=fp8fx.Backend(fp8fx.Config(profit="always")))
    with mock.patch.object(backend, "rewritten", timed), fresh_cache(), torch.no_grad():
        start = time.perf_counter()
        call(**inputs)
        return max(nodes), sum(spent), time.perf_counter() - start


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--zoo", nargs="+", metavar="NAME", help="architectures of tests/zoo")
    args = parser.parse_args()
    print(f"torch {torch.__version__}")
    if args.zoo:
        found = [(name, *share(name)) for name in args.zoo]
        lines = [
            (name, nodes, f"{spent * 1e3:.0f}", f"{whole:.1f}", f"{spent / whole:.2%}")
            for name, nodes, spent, whole in found
        ]
        print(tabulate(lines, ("architecture", "nodes", "rewrite ms", "first call s", "share"), disable_numparse=True))
        return
    cost = measure()
    growth = cost[SIZES[-1]] / cost[SIZES[-2]]
    rows = [(n, f"{cost[n] * 1e6:.0f}", f"{cost[n] / cost[SIZES[-2]]:.2f}") for n in SIZES]
    print(tabulate(rows, ("linears", "us a linear", f"against {SIZES[-2]:,}")))
    if args.check and growth > ALLOWED_GROWTH:
        raise SystemExit(
            f"time per linear grew {growth:.2f}x from {SIZES[-2]:,} to {SIZES[-1]:,}; "
            f"at most {ALLOWED_GROWTH} is allowed"
        )


if __name__ == "__main__":
    main()
