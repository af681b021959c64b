"""Random small modules: eager, convert and compile must agree. `python -m tests.fuzz --graphs 1000 --seed 0 --compile aot_eager`

Graph number i has the seed `--seed` + i and is the same wherever it runs, so `--seed <that> --graphs 1` repeats a failure. Each module is
source text, with its forward and the same by hand, written with the FP8 op (`tests.written`). Of each is demanded:

- by hand, each FP8 product lies within the error of E4M3 rounding around the exact one, derived from the operands;
- convert's result, its gradients and the inputs it changes in place are those by hand, bit for bit, through symbolic_trace and
  torch.export, and with profit='never' those of the module itself;
- so is what torch.compile gives, in AOTAutograd's graph run eagerly; Inductor sums in its own order, so its result has an SQNR bound;
- the report has a row for each matmul written, and as many rewritten as by hand.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import multiprocessing
import random
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.debugging import aot_eager

from fp8fx.backend import Backend
from fp8fx.config import RECIPES, Config
from fp8fx.convert import convert, rewritten
from fp8fx.numerics import sqnr
from fp8fx.report import Report
from tests.programs import Program, write
from tests.written import fp8, same


class DisagreementError(AssertionError):
    """A graph on which two ways do not agree."""


def _error(x: Tensor, cast: Any, dims: tuple[int, ...]) -> Tensor:
    """How far a value in E4M3 may lie from its own: half a step, relative, or of the lowest binade."""
    target = cast.format.target
    scale = x.abs().amax(dims, keepdim=True) / target if x.numel() else x.new_zeros(())
    return x.abs() * 2**-4 + scale.clamp(min=2**-125) * 2**-10


def bounded(recipe: str) -> Any:
    """`fp8(recipe)`, where each product must lie within the error of its rounding."""
    mm, gemm = fp8(recipe), RECIPES[recipe].forward
    assert gemm is not None

    def checked(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        y = mm(a, b, bias)
        with torch.no_grad():
            left, right = a.double(), b.double()
            of_a = _error(left, gemm.lhs, (-1,) if gemm.lhs.granularity != "tensor" else tuple(range(a.dim())))
            of_b = _error(right, gemm.rhs, (0,) if gemm.rhs.granularity != "tensor" else (0, 1))
            most = (left.abs() + of_a) @ (right.abs() + of_b)
            addend = 0 if bias is None else bias.double()
            info = torch.finfo(y.dtype)
            rounding = (most + abs(addend)) * (4 * info.eps + a.shape[-1] * 2**-23) + 4 * a.shape[-1] * info.smallest_normal
            far = (y.double() - (left @ right + addend)).abs() > most - left.abs() @ right.abs() + rounding
            if bool((far & (most < info.max / 2)).any()):
                shapes = f"{tuple(a.shape)} @ {tuple(b.shape)}"
                raise DisagreementError(f"{recipe}: a product is further from the exact one than E4M3 rounds, {shapes}")
        return y

    return checked


@dataclass
class Run:
    """What a call gave: its results, the inputs after it, and the gradients of inputs and parameters."""

    results: dict[str, Tensor]
    strides: list[tuple[int, ...]] = field(default_factory=list)


def _gradients(outputs: Sequence[Tensor], of: Sequence[Tensor]) -> list[Tensor | None]:
    torch.manual_seed(0)
    wanted = [(y, torch.randn(y.shape).to(y.dtype)) for y in outputs if y.requires_grad]
    if not wanted:
        return []
    return list(torch.autograd.grad([y for y, _ in wanted], of, [g for _, g in wanted], allow_unused=True))


def run(program: Program, call: Callable[..., Any], model: nn.Module, grad: bool) -> Run:
    """Calls it on fresh inputs; buffers stay as they were."""
    inputs, kept = program.arguments(grad), {name: x.clone() for name, x in model.named_buffers()}
    of = [x for x in (*inputs, *model.parameters()) if x.requires_grad]
    with torch.set_grad_enabled(grad):
        outputs = list(call(*inputs))
        found: dict[str, Any] = {f"output {i}": y for i, y in enumerate(outputs)}
        found |= {f"gradient {i}": g for i, g in enumerate(_gradients(outputs, of)) if g is not None} if grad else {}
    found |= {f"input {i}": x for i, x in enumerate(inputs)}
    for name, x in model.named_buffers():
        x.copy_(kept[name])
    return Run({name: x.detach() for name, x in found.items()}, [y.stride() for y in outputs])


def _demand_same(what: str, expected: Run, found: Run) -> None:
    if found.results.keys() != expected.results.keys():
        raise DisagreementError(f"{what}: gives {sorted(found.results)}, not {sorted(expected.results)}")
    for name, x in expected.results.items():
        y = found.results[name]
        if not same(x, y):
            differs = f"{tuple(x.shape)} {x.dtype}, {tuple(y.shape)} {y.dtype}"
            if x.shape == y.shape:
                differs += f": {int((x != y).sum())} of {x.numel()} values, at most {(x.double() - y.double()).abs().max():.3g}"
            raise DisagreementError(f"{what}: {name} differs, {differs}")


def _demand_close(what: str, expected: Run, found: Run, bound: float) -> None:
    for name, x in expected.results.items():
        y = found.results[name]
        if x.shape != y.shape or x.dtype != y.dtype:
            raise DisagreementError(f"{what}: {name} is {tuple(y.shape)} {y.dtype}, not {tuple(x.shape)} {x.dtype}")
        known = x.isfinite() & y.isfinite()
        if x[known].double().norm() > 0 and (found_ := sqnr(x[known], y[known])) < bound:
            raise DisagreementError(f"{what}: {name} has an SQNR of {found_:.1f} dB, below {bound}")


def _demand_rows(what: str, program: Program, report: Report, whole: bool) -> None:
    """A row a matmul. A tracer that drops dead code leaves fewer."""
    rows, done = sum(line.rows for line in program.lines), sum(line.rewritten for line in program.lines)
    seen, rewritten_ = len(report.rows), len(report.rewritten)
    if seen != rows or rewritten_ != done if whole else seen > rows or rewritten_ > done:
        raise DisagreementError(f"{what}: {rewritten_} of {seen} matmuls rewritten, expected {done} of {rows}\n{report}")


class Lowered:
    """A torch.compile backend: the rewrite, then AOTAutograd's graph run eagerly."""

    def __init__(self, config: Config) -> None:
        self.config, self.reports = config, []

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        new, report = rewritten(gm, inputs, self.config)
        self.reports.append(report)
        return aot_eager(new, inputs)  # type: ignore[no-any-return]


def check(program: Program, compiler: str) -> list[str]:
    """Holds one program against itself; returns what was compared.

    Raises:
        DisagreementError, or whatever one of the ways raised that the module itself does not.
    """
    rng = random.Random(program.seed)
    recipe, grad = rng.choice(sorted(RECIPES)), rng.random() < (0.15 if compiler == "inductor" else 0.4)
    config, done = Config(recipe=recipe, convolutions=True, routers=True, profit="always"), []
    model = program.model()
    try:
        plain = run(program, model, model, grad)
    except RuntimeError:
        if not grad:
            raise
        grad = False
        plain = run(program, model, model, grad)
    hand = run(program, lambda *xs: model.by_hand(bounded(recipe), *xs), model, grad)
    if program.traceable:
        gm = model if rng.random() < 0.5 else fx.symbolic_trace(model)
        with torch.set_grad_enabled(grad):
            new = convert(gm, program.arguments(grad), config)
        _demand_rows("convert", program, new.meta["fp8fx_report"], True)
        found = run(program, new, model, grad)
        _demand_same("convert", hand, found)
        if rng.random() < 0.3:
            with torch.set_grad_enabled(grad):
                never = convert(gm, program.arguments(grad), config, profit="never")
            _demand_same("profit='never'", plain, run(program, never, model, grad))
        done.append("symbolic_trace")
    if rng.random() < 0.1 or not program.traceable:
        kept = grad and program.traceable  # export keeps no checkpoint, nor what it recomputes
        with torch.set_grad_enabled(kept):
            exported = torch.export.export(model, tuple(program.arguments(kept)))
            new = convert(exported, config=config)
        _demand_rows("export", program, new.meta["fp8fx_report"], False)
        forward = Run({name: x for name, x in hand.results.items() if kept or not name.startswith("gradient")})
        _demand_same("export", forward, run(program, new, new, kept))
        done.append("export")
    if compiler == "inductor" or (compiler == "aot_eager" and (rng.random() < 0.12 or not program.traceable)):
        torch._dynamo.reset()
        never = rng.random() < 0.1
        backend: Any = (Backend if compiler == "inductor" else Lowered)(replace(config, profit="never") if never else config)
        found = run(program, torch.compile(model, backend=backend, fullgraph=True), model, grad)
        report = Report.merged(backend.reports)
        if not never:
            _demand_rows("compile", program, report, False)
        expected = plain if never else hand
        done.append("compile")
        try:
            _demand_same("compile", expected, found)
        except DisagreementError:
            _demand_close("compile", expected, found, 20)
            done.append("to rounding")
    if grad:
        done.append("gradients")
    return done


def attempt(seed: int, compiler: str, device: str = "cpu") -> tuple[list[str], str]:
    """What was compared of one graph, and how it failed: its source and the error, or nothing."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    program = write(seed)
    try:
        if device != "cpu":
            torch.set_default_device(device)
        return check(program, compiler), ""
    except Exception:  # whatever it is, it is what we look for
        return ["failed"], f"seed {seed}\n{program.source}{traceback.format_exc(limit=-4)}"
    finally:
        torch.set_default_device(None)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="random modules: eager, convert and compile must agree")
    parser.add_argument("--graphs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the first graph; the next have the next")
    parser.add_argument("--compile", choices=("aot_eager", "inductor", "none"), default="aot_eager")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    options = parser.parse_args()
    one = functools.partial(attempt, compiler=options.compile, device=options.device)
    seeds = range(options.seed, options.seed + options.graphs)
    counts: collections.Counter[str] = collections.Counter()
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        found: Iterable[tuple[list[str], str]] = map(one, seeds)
        if options.jobs > 1:
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(options.jobs, maxtasksperchild=50))
            found = pool.imap(one, seeds, chunksize=8)
        for done, failure in found:
            counts.update(["graphs", *done])
            if failure:
                print(failure, flush=True)
            if counts["graphs"] % 500 == 0:
                print(f"{counts['graphs']} graphs, {counts['failed']} failed", file=sys.stderr, flush=True)
    print(f"{dict(counts)}, {time.perf_counter() - start:.0f} s")
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
