"""Inference: bf16 Inductor, torchao's and bitsandbytes' float8 linears, and ours with frozen weights, each in a process
of its own.

    python -m benchmarks.inference [--cases llama-decode-1 generate ...] [--contenders bf16 mixed ...] [--together 16]

Prints a table with ratios against bf16 and writes the raw figures, with every kernel's time, to
benchmarks/results/inference_<case>.json.
"""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from tabulate import tabulate
from torch import Tensor, nn

import fp8fx
from benchmarks.harness import arguments, await_turn, compare, kernel_times, milliseconds
from benchmarks.models import DiTBlock, GPT2Block, LlamaBlock, llama_lm, stack, to_bitsandbytes

BITSANDBYTES = "bitsandbytes LinearFP8Mixed"
TORCHAO = ("torchao PerTensor", "torchao PerRow", "torchao weight-only")
OURS = ("mixed", "global", "rowwise")
CONTENDERS = ("bf16", *TORCHAO, BITSANDBYTES, *OURS)


@dataclass(frozen=True)
class Blocks:
    """Four blocks on one batch.

    Attributes:
        block: their class.
        shape: the input's: sequences, tokens, width.
        graph: the compiled model runs in CUDA graphs.
        compared: how many tokens' output is compared with float64's: the first of one sequence, or several short ones'
            whole.
        left_out: contenders that cannot run it.
        steps: what a call counts as.
        tuned: torchao sets the Inductor options that it recommends, which tune each kernel.
    """

    block: type[nn.Module]
    shape: tuple[int, int, int]
    graph: bool = False
    compared: int = 512
    left_out: tuple[str, ...] = ()
    steps: ClassVar[int] = 1
    tuned: ClassVar[bool] = True

    def build(self, device: str = "cuda", **sizes: int) -> tuple[nn.Module, Tensor]:
        return stack(self.block, 4, device, **sizes), torch.randn(self.shape, device=device, dtype=torch.bfloat16)

    def run(self, model: nn.Module, x: Tensor) -> Any:
        return model(x)

    def inputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """What the model is called with."""
        return (x,)

    def part(self, y: Tensor) -> Tensor:
        """What of an input or output is compared, in float64."""
        return y[: max(self.compared // y.shape[1], 1), : self.compared].double()

    def reference(self, model: nn.Module, x: Tensor) -> Tensor:
        """That part of the output, computed in float64 block by block: a copy of all would not fit beside the other
        contenders."""
        return functools.reduce(lambda y, block: copy.deepcopy(block).double()(y), model.children(), self.part(x))


@dataclass(frozen=True)
class Generate:
    """A language model continues a prompt of so many tokens, greedily and over a static cache; a step is a new token.

    Not tuned: on an H100 torchao's tuning of the two graphs had not ended after seven minutes.
    """

    prompt: int = 64
    steps: int = 32
    graph: ClassVar[bool] = False
    tuned: ClassVar[bool] = False
    left_out: ClassVar[tuple[str, ...]] = (BITSANDBYTES,)

    def build(self, device: str = "cuda", **sizes: int) -> tuple[nn.Module, Tensor]:
        model: Any = llama_lm(device, **sizes)
        return model, torch.randint(3, model.config.vocab_size, (1, self.prompt), device=device)

    def run(self, model: Any, x: Tensor) -> Any:
        count = {"min_new_tokens": self.steps, "max_new_tokens": self.steps, "do_sample": False, "pad_token_id": 0}
        # disable_compile: transformers itself would compile the decoding over a static cache.
        return model.generate(
            x, attention_mask=torch.ones_like(x), cache_implementation="static", disable_compile=True, **count
        )

    def inputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """What the model is called with, but for the cache: the prompt, and token by token."""
        return x, x[:, :1]


_GRAPH: Any = {"graph": True, "left_out": (BITSANDBYTES,)}
CASES: dict[str, Blocks | Generate] = {
    "llama-prefill-2x4096": Blocks(LlamaBlock, (2, 4096, 4096)),
    "llama-prefill-1x512": Blocks(LlamaBlock, (1, 512, 4096)),
    **{f"llama-decode-{batch}": Blocks(LlamaBlock, (batch, 1, 4096)) for batch in (1, 16, 64)},
    **{f"llama-decode-{batch}-graph": Blocks(LlamaBlock, (batch, 1, 4096), **_GRAPH) for batch in (1, 16, 64)},
    "gpt2-prefill": Blocks(GPT2Block, (8, 1024, 1600)),  # addmm: torchao and bitsandbytes find no nn.Linear here
    "gpt2-decode-1-graph": Blocks(GPT2Block, (1, 1, 1600), **_GRAPH),
    "dit-prefill": Blocks(DiTBlock, (8, 1024, 1152), compared=1024),
    "generate": Generate(),
}


def prepare(
    model: nn.Module, contender: str, graph: bool = False, dynamic: bool | None = None, tuned: bool = True
) -> None:
    """Makes the model's forward what the contender runs: compiled, in CUDA graphs if asked, or bitsandbytes' eager one.

    Where `tuned`, torchao sets Inductor's options as it recommends.
    """
    arguments: dict[str, Any] = {} if dynamic is None else {"dynamic": dynamic}
    mode = {"mode": "reduce-overhead"} if graph else {}
    if contender == BITSANDBYTES:
        to_bitsandbytes(model)
        return
    if contender in TORCHAO:
        from torchao import quantization as ao

        kind, options = contender.removeprefix("torchao "), {"set_inductor_config": tuned}
        if kind == "weight-only":
            ao.quantize_(model, ao.Float8WeightOnlyConfig(**options))
        else:
            ao.quantize_(
                model, ao.Float8DynamicActivationFloat8WeightConfig(granularity=getattr(ao, kind)(), **options)
            )
    elif contender in OURS:
        fp8fx.freeze(model, contender)
        arguments["backend"] = "fp8"
    elif contender != "bf16":
        raise ValueError(f"unknown contender {contender!r}; expected one of {', '.join(CONTENDERS)}")
    model.forward = torch.compile(model.forward, **arguments, **mode)


def host_microseconds(call: Callable[[], Any], calls: int = 200, queue: int = 20) -> float:
    """The median time of one call on the host, which waits for the device every `queue` calls, lest its queue fill
    up."""
    spent = []
    for index in range(calls):
        if index % queue == 0:
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        spent.append(time.perf_counter() - start)
    return statistics.median(spent) * 1e6


def resident(x: Tensor) -> float:
    """GiB of everything alive but the input `x`: the weights, and cuBLAS's workspace."""
    gc.collect()
    return (torch.cuda.memory_allocated() - x.nbytes) / 2**30


@torch.no_grad()
def decide(cases: Sequence[str], recipes: Sequence[str]) -> None:
    """Has `profit="auto"` measure and remember what it needs while nothing else uses the device."""
    for name, recipe in itertools.product(cases, recipes):
        model, x = CASES[name].build()
        for seen in CASES[name].inputs(x):
            fp8fx.Backend(fp8fx.Config(recipe=recipe, freeze=True)).explain(model, seen)


@torch.no_grad()
def one(name: str, contender: str) -> dict[str, Any]:
    """Seconds of the first call, GiB, error, and what a step takes: milliseconds on the device, microseconds on the
    host."""
    case = CASES[name]
    model, x = case.build()
    run = functools.partial(case.run, model, x)
    expected = case.reference(model, x) if isinstance(case, Blocks) else None
    torch.cuda.empty_cache()
    prepare(model, contender, case.graph, tuned=case.tuned)
    start = time.perf_counter()
    y = run()
    torch.cuda.synchronize()
    found: dict[str, Any] = {"compile_s": time.perf_counter() - start}
    if isinstance(case, Blocks) and expected is not None:
        found["relative_error"] = float((case.part(y) - expected).norm() / expected.norm())
    del y, expected
    found["weights_gib"] = resident(x)
    await_turn()
    run()  # CUDA graphs are captured by the second call; what a replay uses in their pool is not in the peak
    torch.cuda.reset_peak_memory_stats()
    run()
    found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    slow = contender == BITSANDBYTES or case.steps > 1
    found["ms"] = (milliseconds(run, batches=3, least=50, warmup=1) if slow else milliseconds(run)) / case.steps
    if case.steps > 1:
        found["tokens_per_s"] = 1e3 / found["ms"]
    else:
        found["host_us"] = host_microseconds(run, *((10, 1) if slow else ()))
    kinds, kernels = kernel_times(run, 1 if slow else 5)
    found["kernel_ms"] = {kind: spent / case.steps for kind, spent in kinds.items()}
    found["kernel_count"] = (
        sum(count for _, spent, count in kernels if spent) / case.steps
    )  # the driver's own calls have 0 ms
    found["kernels"] = [(kernel, spent / case.steps, count / case.steps) for kernel, spent, count in kernels[:40]]
    return found


_FIGURES = {"host us": ("host_us", ".0f"), "peak GiB": ("peak_gib", ".2f"), "weights GiB": ("weights_gib", ".2f")}
_FIGURES |= {"compile s": ("compile_s", ".1f"), "error": ("relative_error", ".1e")}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The contenders' figures side by side; the weights' in brackets are without the originals, of results that were
    made when these were released apart."""
    base, kinds, lines = rows.get("bf16", {}).get("ms"), ("GEMM", "quantize", "attention", "other"), []
    for contender, row in rows.items():
        if "error" in row:
            lines.append([contender, row["error"][:80]])
            continue
        figures = {title: format(row[key], spec) if key in row else "" for title, (key, spec) in _FIGURES.items()}
        figures["weights GiB"] += f" ({row['released_gib']:.2f})" if "released_gib" in row else ""
        times = [f"{row['kernel_ms'].get(kind, 0):.3f}" for kind in kinds]
        speed = f"{base / row['ms']:.3f}x" if base else ""
        lines.append([contender, f"{row['ms']:.3f}", speed, *figures.values(), *times, f"{row['kernel_count']:.0f}"])
    return tabulate(
        lines,
        ("", "ms", "against bf16", *_FIGURES, *(f"{kind} ms" for kind in kinds), "kernels"),
        disable_numparse=True,
    )


def main() -> None:
    """Runs every contender on every case."""
    args = arguments(__doc__, CASES, CONTENDERS)
    if args.one:
        print(json.dumps(one(*args.one)))
        return
    runs = [(case, name) for case in args.cases for name in args.contenders if name not in CASES[case].left_out]
    if args.together > 1:
        decide(args.cases, [name for name in args.contenders if name in OURS])
    compare("inference", runs, args, table)


if __name__ == "__main__":
    main()
