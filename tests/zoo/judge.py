"""One architecture: runs it through the backend and says how that went.

python -m tests.zoo.judge NAME DEVICE [eager]     prints the Verdict as JSON, in the last line; with
"eager" without Inductor
"""

from __future__ import annotations

import copy
import json
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fp8fx
from fp8fx.convert import rewritten
from fp8fx.errors import FP8Warning
from fp8fx.report import Report
from tests.zoo.accuracy import Accuracy, Result, judged
from tests.zoo.flops import Flops
from tests.zoo.models import ZOO, Built

__all__ = [
    "ACTIVATIONS",
    "GOAL",
    "RECIPES",
    "ROUTER",
    "RUNS",
    "SHORT",
    "UNSEEN",
    "Coverage",
    "Eager",
    "Run",
    "Verdict",
    "judge",
]

RECIPES, KINDS = ("mixed", "global"), ("inference", "training")
RUNS = tuple((kind, recipe) for kind in KINDS for recipe in RECIPES)
ACTIVATIONS = "activation times activation"
UNSEEN = "in no graph of Dynamo's"
ROUTER = "a router: topk chooses by it; routers=True rewrites it too"

GOAL = 0.95
"""The share of FP8 in the FLOPs of weights that an architecture has to reach."""

SHORT: Mapping[str, tuple[float, frozenset[str]]] = {
    "Mixtral-eager": (0.24, frozenset({ROUTER, UNSEEN})),
    "Mixtral-batched": (0.24, frozenset({ROUTER, "the weight is gathered by an index"})),
}
"""Those that cannot: what they have to reach instead, and the reasons that they must give."""


@dataclass(frozen=True)
class Coverage:
    """How much of a run is FP8.

    Attributes:
        matmuls, linears: how many there are in the graphs, and how many of these have a weight for an operand.
        rewritten: how many run in FP8, all of them linears.
        refused: how many of the others for which reason; 0 times UNSEEN where the model multiplies more weights than
            its graphs show.
        share: of all matmul FLOPs, attention's included, those in FP8.
        weights_share: of the FLOPs with a weight for an operand, those in FP8.
    """

    matmuls: int
    linears: int
    rewritten: int
    refused: Mapping[str, int]
    share: float
    weights_share: float

    @classmethod
    def of(cls, report: Report, flops: Flops) -> Coverage:
        """What `report` says of a model of these FLOPs."""
        linears = [row for row in report.rows if row.reason != ACTIVATIONS]
        reasons = [row.reason or "" for row in report.refused]
        refused = {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)}
        if sum(row.flops or 0 for row in linears) < flops.of_weights:
            refused[UNSEEN] = 0
        fp8 = sum(row.flops or 0 for row in report.rewritten)
        return cls(
            len(report.rows), len(linears), len(report.rewritten), refused, fp8 / flops.total, fp8 / flops.of_weights
        )

    def problems(self, name: str) -> list[str]:
        """How that architecture falls short."""
        goal, reasons = SHORT.get(name, (GOAL, frozenset()))
        found = [f"without the reason: {reason}" for reason in sorted(reasons - self.refused.keys())]
        if self.weights_share < goal:
            found.append(f"{self.weights_share:.1%} of the FLOPs of weights in FP8, not {goal:.0%}")
        return found


@dataclass(frozen=True)
class Run:
    """Inference or a training step, by one recipe, called twice.

    Attributes:
        kind, recipe: which.
        coverage: of the first call.
        accuracy: of the second call.
        graphs: how many the first call compiled.
        compilations, expected: in both calls, by this backend and by backend="eager".
    """

    kind: str
    recipe: str
    coverage: Coverage
    accuracy: Accuracy
    graphs: int
    compilations: int
    expected: int

    def problems(self, name: str) -> list[str]:
        """Why that architecture does not pass."""
        found = [*self.coverage.problems(name), *self.accuracy.problems]
        if self.compilations != self.expected:
            found.append(f'{self.compilations} compilations, {self.expected} by backend="eager"')
        return [f"{self.kind} by {self.recipe}: {problem}" for problem in found]


@dataclass(frozen=True)
class Verdict:
    """How one architecture fared.

    Attributes:
        name, dtype, executor: which, in which dtype it is compiled, and what its FP8 matmuls ran on.
        half: what the eager model in bfloat16 loses in a training step.
        runs: by recipe, inference and training.
        seconds: for all of it.
        problems: why it does not pass; empty if it does.
    """

    name: str
    dtype: str
    executor: str
    half: Accuracy
    runs: Sequence[Run]
    seconds: float
    problems: Sequence[str]

    @property
    def coverage(self) -> Coverage:
        """Of the worst run."""
        return min((run.coverage for run in self.runs), key=lambda coverage: coverage.weights_share)


class Eager(fp8fx.Backend):
    """The backend without Inductor: rewrites the graph and runs it as it is, which takes seconds where C++ takes
    minutes."""

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        new, report = rewritten(gm, example_inputs, self.config)
        self.reports.append(report)
        return new.forward


class _Counting:
    """A backend, and how often each graph that it compiled was called."""

    def __init__(self, backend: Callable[..., Any]) -> None:
        self.backend, self.calls = backend, list[int]()

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        compiled, index = self.backend(gm, example_inputs), len(self.calls)
        self.calls.append(0)

        def counted(*args: Any) -> Any:
            self.calls[index] += 1
            return compiled(*args)

        return counted


def _as_it_is(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    return gm.forward


def _model(built: Built, dtype: torch.dtype, device: str) -> nn.Module:
    """A copy in that dtype, but for rotary frequencies, which stay in float32 as they do where a checkpoint is
    loaded."""
    model = copy.deepcopy(built.model).to(dtype)
    for (name, buffer), exact in zip(model.named_buffers(), built.model.buffers(), strict=True):
        if name.endswith("inv_freq"):
            buffer.data = exact.clone()
    return model.to(device)


def _run(built: Built, model: nn.Module, call: Callable[..., Any], training: bool) -> Result:
    """One inference or training step."""
    p = next(model.parameters())
    model.train(training or built.training).zero_grad()
    inputs = {name: x.to(p.device, p.dtype if x.is_floating_point() else x.dtype) for name, x in built.inputs.items()}
    with torch.set_grad_enabled(training):
        output = built.output(call(**inputs))
    if training:
        built.loss(output).backward()

    def exactly(x: Tensor) -> Tensor:
        return x.detach().to("cpu", torch.float64)

    # Of a parameter that only an unused output depends on, eager mode has no gradient and a compiled graph zeros.
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters() if training
    }
    return Result(exactly(output), {name: exactly(x) for name, x in gradients.items()})


def _reference(built: Built) -> tuple[Result, Flops]:
    """A training step in float64 on the CPU, by the plainest kernels."""
    model = copy.deepcopy(built.model).double()
    if hasattr(model, "config"):
        model.config._experts_implementation = "eager"
    flops = Flops(model)

    def forward(**inputs: Tensor) -> Any:
        with sdpa_kernel(SDPBackend.MATH), flops:
            return model(**inputs)

    return _run(built, model, forward, training=True), flops


def _compiled(built: Built, device: str, backend: Callable[..., Any], training: bool) -> tuple[Result, list[int], int]:
    """What the second of two equal calls gives, how often the first called each graph that it compiled, and how many
    both compiled."""
    torch._dynamo.reset()
    model, counting = _model(built, built.dtype, device), _Counting(backend)
    call = torch.compile(model, backend=counting)
    _run(built, model, call, training)
    calls = list(counting.calls)
    return _run(built, model, call, training), calls, len(counting.calls)


def judge(
    name: str,
    device: str = "cpu",
    runs: Sequence[tuple[str, str]] = RUNS,
    backend: Callable[[fp8fx.Config], fp8fx.Backend] = fp8fx.Backend,
) -> Verdict:
    """The architecture of that name, in these runs, with profit="always"."""
    start, built = time.perf_counter(), ZOO[name]()
    reference, flops = _reference(built)
    model = _model(built, torch.bfloat16, device)
    half = _run(built, model, model, training=True)
    expected = {kind: _compiled(built, device, _as_it_is, kind == "training")[2] for kind in dict(runs)}
    done: list[Run] = []
    executors: set[str] = set()
    for kind, recipe in runs:
        rewriting, training = backend(fp8fx.Config(recipe=recipe, profit="always")), kind == "training"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FP8Warning)  # of a graph without linears; the model has others
            result, calls, compilations = _compiled(built, device, rewriting, training)
        found = judged(reference if training else Result(reference.output), half, result)
        called = zip(rewriting.reports, calls, strict=False)  # equal layers may share a graph
        report = Report.merged([report for report, times in called for _ in range(times)])
        executors |= {row.executor for row in report.rewritten if row.executor}
        done.append(Run(kind, recipe, Coverage.of(report, flops), found, len(calls), compilations, expected[kind]))
    return Verdict(
        name,
        dtype=str(built.dtype).removeprefix("torch."),
        executor=", ".join(sorted(executors)),
        half=judged(reference, half, half),
        runs=done,
        seconds=time.perf_counter() - start,
        problems=[problem for run in done for problem in run.problems(name)],
    )


if __name__ == "__main__":
    torch.set_num_threads(1)  # the tensors are small
    name, device, *eager = sys.argv[1:]
    print(json.dumps(asdict(judge(name, device, backend=Eager if eager else fp8fx.Backend))))
