"""One training step, forward and backward: bf16 Inductor, torchao's float8 training and ours, each in a process of its
own.

    python -m benchmarks.train_step [--cases llama gpt2 ...] [--contenders bf16 mixed ...] [--together 6]

Prints a table with ratios against bf16 and writes the raw figures, with every kernel's time, to
benchmarks/results/train_step_<case>.json.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from benchmarks.harness import arguments, await_turn, compare, kernel_times, milliseconds
from benchmarks.models import GPT2Block, LlamaBlock, stack


@dataclass(frozen=True)
class Case:
    """So many blocks, and an input of (batch, length, width)."""

    block: type[nn.Module]
    count: int
    batch: int
    length: int
    width: int


CASES = {
    "llama": Case(LlamaBlock, 2, 2, 4096, 4096),  # M = 8192
    "llama-small-m": Case(LlamaBlock, 2, 1, 1024, 4096),  # M = 1024
    "gpt2": Case(GPT2Block, 4, 8, 1024, 1600),  # M = 8192, addmm: torchao finds no nn.Linear here
}
TORCHAO = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
CONTENDERS = ("bf16", *(f"torchao {recipe}" for recipe in TORCHAO), "mixed", "global")


def compiled(model: nn.Module, contender: str) -> Callable[[Tensor], Tensor]:
    """The model as the contender trains it."""
    if contender == "bf16":
        return torch.compile(model)
    if contender.startswith("torchao "):
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        config = Float8LinearConfig.from_recipe_name(contender.removeprefix("torchao "))
        return torch.compile(convert_to_float8_training(model, config=config))
    return torch.compile(model, backend="fp8", options={"recipe": contender})


def stepper(case: Case, contender: str, device: str = "cuda", **sizes: int) -> Callable[[], list[Tensor | None]]:
    """A training step without the optimizer's part: forward and backward, whose gradients it returns, the input's
    first."""
    model = stack(case.block, case.count, device, **sizes)
    x, grad = (torch.randn(case.batch, case.length, case.width, device=device, dtype=torch.bfloat16) for _ in range(2))
    call, leaves = compiled(model, contender), [x.requires_grad_(), *model.parameters()]

    def step() -> list[Tensor | None]:
        call(x).backward(grad)
        found = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        return found

    return step


def one(case: str, contender: str) -> dict[str, Any]:
    """Compile seconds, step milliseconds, peak GiB and kernel times."""
    step = stepper(CASES[case], contender)
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    await_turn()
    step()
    torch.cuda.reset_peak_memory_stats()
    step()
    peak = torch.cuda.max_memory_allocated() / 2**30
    spent = milliseconds(step)
    kinds, kernels = kernel_times(step)
    return {"compile_s": seconds, "ms": spent, "peak_gib": peak, "kernel_ms": kinds, "kernels": kernels[:40]}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The contenders' figures side by side."""
    base, kinds = rows.get("bf16", {}), ("GEMM", "quantize", "attention", "other")
    lines = []
    for contender, row in rows.items():
        if "error" in row:
            lines.append([contender, row["error"][:80]])
            continue
        speed = f"{base['ms'] / row['ms']:.3f}x" if "ms" in base else ""
        seconds = f"{row['compile_s']:.1f}" if "compile_s" in row else ""
        times = [f"{row['kernel_ms'].get(kind, 0):.1f}" for kind in kinds]
        lines.append([contender, f"{row['ms']:.2f}", speed, f"{row['peak_gib']:.2f}", seconds, *times])
    titles = ("", "ms", "against bf16", "peak GiB", "compile s", *(f"{kind} ms" for kind in kinds))
    return tabulate(lines, titles, disable_numparse=True)


def main() -> None:
    """Runs every contender on every case."""
    args = arguments(__doc__, CASES, CONTENDERS)
    if args.one:
        print(json.dumps(one(*args.one)))
        return
    compare("train_step", [(case, name) for case in args.cases for name in args.contenders], args, table)


if __name__ == "__main__":
    main()
