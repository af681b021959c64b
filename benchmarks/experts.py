"""Mixtures of experts: the grouped GEMM of bfloat16 against FP8's, alone and with what it quantizes, and a whole frozen
mixture.

    python -m benchmarks.experts [--cases 8x4096x28672x16384 mixtral-64 ...] [--contenders bf16 mixed ...]
        [--together 4]

A case is ExKxNxT, T rows that E experts share at random, or two blocks shaped as Mixtral's on so many tokens. Prints a
table with ratios against bf16 and writes the raw figures to benchmarks/results/experts_<case>.json.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

import fp8fx
from benchmarks.harness import arguments, await_turn, compare, kernel_times, milliseconds
from benchmarks.inference import host_microseconds, resident
from benchmarks.models import MoEBlock, stack
from fp8fx.executors.scaled_mm import ScaledMM
from fp8fx.ops import grouped_mm as grouped
from fp8fx.recipes.quantize import quantize, quantize_experts
from fp8fx.recipes.recipe import MIXED

CONTENDERS = ("bf16", "GEMM", "mixed", "mixed frozen")
"""bf16 Inductor; the FP8 GEMM alone, all operands quantized before; with all that it quantizes in a call; with frozen
weights."""


@dataclass(frozen=True)
class Grouped:
    """One grouped matmul: `rows` (T, K) times weights (E, K, N)."""

    experts: int
    k: int
    n: int
    rows: int
    contenders: ClassVar[tuple[str, ...]] = CONTENDERS

    def operands(self, device: str = "cuda") -> tuple[Tensor, Tensor, Tensor]:
        """Rows, weights (E, N, K), and where each expert's rows end."""
        torch.manual_seed(0)
        x = torch.randn(self.rows, self.k, device=device, dtype=torch.bfloat16)
        w = torch.randn(self.experts, self.n, self.k, device=device, dtype=torch.bfloat16) * 0.02
        ends = [*torch.randint(0, self.rows + 1, (self.experts - 1,)).sort().values.tolist(), self.rows]
        return x, w, torch.tensor(ends, device=device, dtype=torch.int32)

    def call(self, contender: str, device: str = "cuda") -> Callable[[], Tensor]:
        """What is timed."""
        assert MIXED.forward is not None
        (x, w, offs), op, cast = self.operands(device), grouped.op("mixed"), MIXED.forward.rhs
        if contender == "bf16":
            compiled = torch.compile(lambda x, w: F.grouped_mm(x, w.transpose(-2, -1), offs=offs))
            return functools.partial(compiled, x, w)
        if contender == "mixed":
            compiled = torch.compile(lambda x, w: op(x, w.transpose(-2, -1), offs))
            return functools.partial(compiled, x, w)
        frozen = quantize_experts(w, cast, quantize)
        if contender == "mixed frozen":
            compiled = torch.compile(lambda x, data, scale: op(x, data.transpose(-2, -1), offs, b_scale=scale))
            return functools.partial(compiled, x, *frozen)
        row = quantize(x, MIXED.forward.lhs, 4096)
        return functools.partial(ScaledMM().grouped_matmul, row, frozen, offs, dtype=torch.bfloat16)

    @torch.no_grad()
    def one(self, contender: str) -> dict[str, Any]:
        call = self.call(contender)
        call()
        await_turn()
        return {"ms": milliseconds(call)}


@dataclass(frozen=True)
class Mixture:
    """Two blocks of a router and experts, without attention, on so many tokens.

    Attributes:
        tokens: how many.
        compared: those whose output is compared with float64's, the first ones.
    """

    tokens: int
    compared: int = 512
    contenders: ClassVar[tuple[str, ...]] = ("bf16", "mixed frozen")

    def build(self, device: str = "cuda", width: int = 4096, **sizes: int) -> tuple[nn.Module, Tensor]:
        model = stack(MoEBlock, 2, device, width=width, **sizes)
        return model, torch.randn(self.tokens, width, device=device, dtype=torch.bfloat16)

    def reference(self, model: nn.Module, x: Tensor) -> Tensor:
        """The compared part of the output in float64; where two experts are nearly as good, it may choose the other
        one."""
        y = x[: self.compared].double()
        for block in model.children():
            assert isinstance(block, MoEBlock)
            y = block.exact(y)
        return y

    def compiled(self, model: nn.Module, contender: str) -> Callable[[Tensor], Tensor]:
        """The model as the contender runs it."""
        if contender == "bf16":
            return torch.compile(model)
        return torch.compile(model, backend="fp8", options={"freeze": True})

    @torch.no_grad()
    def one(self, contender: str) -> dict[str, Any]:
        """Seconds of the first call, GiB, error, milliseconds on the device, microseconds on the host, kernel times,
        and what was FP8."""
        model, x = self.build()
        expected = self.reference(model, x)
        torch.cuda.empty_cache()
        run = functools.partial(self.compiled(model, contender), x)
        start = time.perf_counter()
        y = run()
        torch.cuda.synchronize()
        found: dict[str, Any] = {"compile_s": time.perf_counter() - start}
        found["relative_error"] = float((y[: self.compared].double() - expected).norm() / expected.norm())
        del y, expected
        found["weights_gib"] = resident(x)
        await_turn()
        run()
        torch.cuda.reset_peak_memory_stats()
        run()
        found |= {
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
            "ms": milliseconds(run),
            "host_us": host_microseconds(run),
        }
        kinds, kernels = kernel_times(run)
        found |= {"kernel_ms": kinds, "kernels": kernels[:40]}
        if contender != "bf16":
            rows = fp8fx.Backend(fp8fx.Config(freeze=True)).explain(model, x).rows
            found["linears"] = [(row.name, row.reason or row.remark) for row in rows]
        return found


SHAPES = (
    (8, 4096, 28672, 16384),
    (8, 14336, 4096, 16384),
    (128, 2048, 1536, 65536),
    (8, 4096, 28672, 1024),
    (8, 4096, 28672, 64),
)
CASES: dict[str, Grouped | Mixture] = {
    **{"x".join(map(str, shape)): Grouped(*shape) for shape in SHAPES},
    **{f"mixtral-{tokens}": Mixture(tokens) for tokens in (8192, 64)},
}

_FIGURES = {"host us": ("host_us", ".0f"), "peak GiB": ("peak_gib", ".2f"), "weights GiB": ("weights_gib", ".2f")}
_FIGURES |= {
    "released GiB": ("released_gib", ".2f"),
    "compile s": ("compile_s", ".1f"),
    "error": ("relative_error", ".1e"),
}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The contenders' figures side by side."""
    base, kinds, lines = rows.get("bf16", {}).get("ms"), ("GEMM", "quantize", "other"), []
    whole = any("kernel_ms" in row for row in rows.values())
    for contender, row in rows.items():
        if "error" in row:
            lines.append([contender, row["error"][:80]])
            continue
        line = [contender, f"{row['ms']:.3f}", f"{base / row['ms']:.3f}x" if base else ""]
        if whole:
            line += [format(row[key], spec) if key in row else "" for key, spec in _FIGURES.values()]
            line += [f"{row['kernel_ms'].get(kind, 0):.3f}" for kind in kinds]
        lines.append(line)
    more = (*_FIGURES, *(f"{kind} ms" for kind in kinds)) if whole else ()
    return tabulate(lines, ("", "ms", "against bf16", *more), disable_numparse=True)


def main() -> None:
    """Runs every contender on every case that it takes part in."""
    args = arguments(__doc__, CASES, CONTENDERS)
    if args.one:
        case, contender = args.one
        print(json.dumps(CASES[case].one(contender)))
        return
    runs = [(case, name) for case in args.cases for name in args.contenders if name in CASES[case].contenders]
    compare("experts", runs, args, table)


if __name__ == "__main__":
    main()
