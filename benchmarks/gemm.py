"""Single linears, from one row to 16,384: the contenders of benchmarks.inference, ours with frozen weights, all in CUDA
graphs.

    python -m benchmarks.gemm [--cases 4096x4096 ...] [--contenders bf16 mixed ...] [--together 16]

A case is KxN. Prints microseconds of a linear, the ratios against bf16 and errors against float64, and writes them to
benchmarks/results/gemm_<case>.json. Where `profit="auto"` left the linear in bf16 the same kernels ran, and the ratio,
marked with "=", tells how exact the others are.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config

import fp8fx
from benchmarks.harness import arguments, await_turn, contend, environment, milliseconds, save
from benchmarks.inference import CONTENDERS, OURS, prepare

ROWS = tuple(2**i for i in range(15))
SHAPES = (
    (4096, 4096),
    (4096, 6144),
    (4096, 28672),
    (14336, 4096),
    (4096, 1024),
    (8192, 8192),
    (1600, 6400),
    (1152, 4608),
)
CASES = tuple(f"{k}x{n}" for k, n in SHAPES)
COMPARED = 512  # rows whose results are compared with float64's, at most


class Linears(nn.Module):
    """2 to 24 equal linears, more than the L2 cache holds, each with an input of its own: on one input they would be
    merged."""

    def __init__(self, k: int, n: int, least: int = 160_000_000) -> None:
        super().__init__()
        copies = min(max(math.ceil(least / (2 * k * n)), 2), 24)
        self.linears = nn.ModuleList(nn.Linear(k, n, bias=False, dtype=torch.bfloat16) for _ in range(copies))

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return [linear(x) for linear, x in zip(self.linears, inputs, strict=True)]


def compiled(model: nn.Module, contender: str) -> tuple[Callable[..., Any], fp8fx.Backend | None]:
    """The model compiled for each number of rows anew, and our backend, if it is ours, which has the reports."""
    if contender not in OURS:
        prepare(model, contender, dynamic=False)
        return model, None
    backend = fp8fx.Backend(fp8fx.Config(recipe=contender, freeze=True))
    return torch.compile(model, dynamic=False, backend=backend), backend


def captured(call: Callable[[], Any]) -> Callable[[], None]:
    """The call as a CUDA graph that reads its inputs where they are: neither the host nor copies of inputs count."""
    call()
    torch.cuda.synchronize()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        call()  # workspaces of this stream
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph.replay


def exact(model: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    """The first rows' results of the first linear in float64."""
    return inputs[0][:COMPARED].double() @ next(model.parameters()).double().t()


def relative_error(y: Tensor, expected: Tensor) -> float:
    """Of as many rows as both have."""
    rows = min(len(y), len(expected))
    return float((y[:rows].double() - expected[:rows]).norm() / expected[:rows].norm())


def _model(case: str) -> tuple[nn.Module, list[Tensor]]:
    k, n = map(int, case.split("x"))
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Linears(k, n)
        return model, [torch.randn(max(ROWS), k, dtype=torch.bfloat16) for _ in model.linears]


@torch.no_grad()
def decide(cases: Sequence[str], recipes: Sequence[str]) -> None:
    """Has `profit="auto"` measure and remember what it needs while nothing else uses the device."""
    for case in cases:
        model, inputs = _model(case)
        for m, recipe in itertools.product(ROWS, recipes):
            fp8fx.Backend(fp8fx.Config(recipe=recipe, freeze=True)).explain(model, *(x[:m] for x in inputs))


@torch.no_grad()
def one(case: str, contender: str) -> dict[str, Any]:
    """Microseconds of one linear and its error by the number of rows, and where it is FP8."""
    model, inputs = _model(case)
    expected = exact(model, inputs)
    call, backend = compiled(model, contender)
    graphs, fp8, errors = dict[int, Callable[[], None]](), list[str](), dict[str, float]()
    with dynamo_config.patch(recompile_limit=len(ROWS), fail_on_recompile_limit_hit=True):
        for m in ROWS:
            run = functools.partial(call, *(x[:m] for x in inputs))
            errors[str(m)] = relative_error(run()[0], expected)
            graphs[m] = captured(run)
            if backend is not None and backend.reports[-1].rewritten:
                fp8.append(str(m))
    await_turn()
    us = {str(m): 1e3 * milliseconds(graph, batches=7, least=20) / len(inputs) for m, graph in graphs.items()}
    return {"us": us, "relative_error": errors, "fp8": fp8}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Microseconds and ratios by the number of rows, each contender's smallest and errors in the last lines, and below
    what failed."""
    found = {name: row["us"] for name, row in rows.items() if "us" in row}
    ratios = {
        name: {m: found["bf16"][m] / us[m] for m in us}
        for name, us in found.items()
        if name != "bf16" and "bf16" in found
    }
    titles = ("M", *(f"{name} us" for name in found), *(f"bf16 / {name}" for name in ratios))
    lines = [
        [
            m,
            *(f"{us[m]:.2f}" for us in found.values()),
            *(
                f"{ratio[m]:.3f}x{' =' if name in OURS and m not in rows[name]['fp8'] else ''}"
                for name, ratio in ratios.items()
            ),
        ]
        for m in next(iter(found.values()), {})
    ]
    for title, wanted in (
        ("smallest", lambda name, m: True),
        ("in FP8", lambda name, m: name not in OURS or m in rows[name]["fp8"]),
    ):
        least = (
            min((x for m, x in ratio.items() if wanted(name, m)), default=math.nan) for name, ratio in ratios.items()
        )
        lines.append([title, *("" for _ in found), *(f"{x:.3f}x" for x in least)])
    for m in ("1", "64", str(max(ROWS))):
        wrong = (format(rows[name]["relative_error"].get(m, math.nan), ".2e") for name in found)
        lines.append([f"error, M = {m}", *wrong, *("" for _ in ratios)])
    errors = [f"{name}: {row['error'][:120]}" for name, row in rows.items() if "error" in row]
    return "\n".join([tabulate(lines, titles, disable_numparse=True), *errors])


def main() -> None:
    """Runs every contender on every shape."""
    args = arguments(__doc__, CASES, CONTENDERS)
    if args.one:
        print(json.dumps(one(*args.one)))
        return
    print(environment())
    runs = [(case, name) for case in args.cases for name in args.contenders]
    if args.together > 1:
        decide(args.cases, [name for name in args.contenders if name in OURS])
    for case, rows in contend("benchmarks.gemm", runs, args.together, args.patience):
        print(f"\n{case}\n{table(rows)}", flush=True)
        save(f"gemm_{case}", {"case": case, "contenders": rows})


if __name__ == "__main__":
    main()
