"""Random small modules: eager, convert and compile must agree.

    python -m tests.fuzz --graphs 1000 --seed 0 --compile aot_eager

Graph number i has the seed `--seed` + i and is the same wherever it runs, so `--seed <that> --graphs 1` repeats a
failure (with the same `--features`). Each module is source text, with its forward and the same by hand, written with
the FP8 op (`tests.support.written`). Of each is demanded:

- by hand, each FP8 product lies within the error of E4M3 rounding around the exact one, derived from the operands, and
every result has the
  shape and dtype that it has as written;
- convert's result, its gradients and the inputs it changes in place are those by hand, bit for bit, through
symbolic_trace and
  torch.export, and with profit='never' those of the module itself;
- so is what torch.compile gives, in AOTAutograd's graph run eagerly; Inductor sums in its own order, so its result has
an SQNR bound; - the report has a row for each matmul written, and as many rewritten as by hand; - under autocast,
around the call or inside, the same; - frozen, too: where siblings were merged the one GEMM by hand, with a scale of
weights that differ by at most 64x; for other inputs, after
  `refresh` with other weights, and after `release`;
- where the program runs on inputs of other sizes, 1 and 0 among them, the same again: from the graph converted for the
first, from an
  exported one with dynamic shapes, and compiled with dynamic=True, in no more compilations than without the rewrite.
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
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

import fp8fx
from fp8fx.backend import Backend
from fp8fx.config import Config
from fp8fx.convert import convert
from fp8fx.errors import GraphError
from fp8fx.recipes.recipe import RECIPES
from fp8fx.report import Report
from tests.support.agreement import (
    Bounded,
    Counted,
    DisagreementError,
    Lowered,
    Run,
    demand_close,
    demand_rows,
    demand_same,
    merged,
    run,
)
from tests.support.programs import Program
from tests.support.writer import FEATURES, write

_REFUSED = (RuntimeError, IndexError, ValueError)  # what torch raises where sizes do not fit
_OTHERS = (0, 1, 1, 2, 3, 7, 12, 33)


@dataclass
class _Case:
    """One program, and how it is held against itself."""

    program: Program
    compiler: str
    features: Collection[str]
    rng: random.Random
    grad: bool
    config: Config
    model: Any
    done: list[str] = field(default_factory=list)

    def run(self, call: Callable[..., Any], **given: Any) -> Run:
        return run(self.program, call, self.model, self.grad, **given)

    def by_hand(self, report: Report | None = None, nudged: bool = False, **given: Any) -> Run | None:
        """With frozen weights where there is a report, merged as it says; None where it does not tell which are."""
        mm = Bounded(self.config.recipe, report is not None, nudged=nudged)
        result = self.run(lambda *xs: self.model.by_hand(mm, *xs), **given)
        if report is None or not any("one GEMM" in row.remark for row in report.rows):
            return result
        if any("checkpoint" in line.written for line in self.program.lines):  # whose rows come last
            return None
        if (found := merged(report, mm.operands, self.config.recipe)) is None:
            return None
        mm = Bounded(self.config.recipe, True, found, nudged)
        return self.run(lambda *xs: self.model.by_hand(mm, *xs), **given)

    def demand(
        self, what: str, call: Callable[..., Any], *, report: Report | None = None, close: bool = False, **given: Any
    ) -> None:
        """That `call` gives what is given by hand; with `close`, or where results are parts of a merged one, in whose
        layout pointwise work may round otherwise, at least nearly."""
        source = self.program.source
        parts = report is not None and any("one GEMM" in row.remark for row in report.rows)
        uncast = (
            report is not None and "uncast(" in source and "autocast(" in source
        )  # a frozen one is not known not to be cast
        if (expected := self.by_hand(report, **given)) is None:
            self.done.append("merged, not known which")
            self.run(call, **given)
            return
        found = self.run(call, **given)
        try:
            demand_same(what, expected, found)
        except DisagreementError:
            laid_otherwise = expected.strides != found.strides  # of a size of 1, by which torch chooses how to sum
            if not close and not parts and not uncast and not laid_otherwise:
                raise
            demand_close(what, expected, found, 20, self.by_hand(report, nudged=True, **given))
            self.done.append("to rounding")

    def others(self) -> list[Mapping[str, int]]:
        """Other sizes of the inputs, on which the module itself runs."""
        found = []
        for _ in range(4 if self.program.sizes else 0):
            sizes = (
                dict.fromkeys(self.program.sizes, self.rng.choice(_OTHERS))
                if self.rng.random() < 0.3
                else dict(self.program.sizes)
            )
            changed = self.rng.choice(list(sizes))
            sizes[changed] = self.rng.choice(_OTHERS)
            with contextlib.suppress(*_REFUSED):
                self.run(self.model, sizes=sizes)
                found.append(sizes)
        return found


def _convert(case: _Case) -> None:
    """symbolic_trace, convert, and what it makes of other sizes."""
    program, rng = case.program, case.rng
    gm = case.model if rng.random() < 0.5 else fx.symbolic_trace(case.model)
    outside = bool(program.around) and rng.random() < 0.3

    def converted(**options: Any) -> fx.GraphModule:
        with torch.set_grad_enabled(case.grad), contextlib.nullcontext() if outside else program.context():
            return convert(gm, program.arguments(case.grad), case.config, **options)

    try:
        if outside:  # torch 2.15 finds shapes for grouped products of two dtypes, which no kernel multiplies
            case.model(*program.arguments(case.grad))
        new = converted()
    except (GraphError, RuntimeError):
        if outside:
            case.done.append("only under autocast")
        elif _compiles(case):
            raise
        else:  # as an empty product of two dtypes, which runs and has no shapes
            case.done.append("torch does not trace it")
        return
    if not program.around:  # of what nobody reads it does not know the dtype that autocast gives it
        demand_rows("convert", program, new.meta["fp8fx_report"], True)
    case.demand("convert", new)
    for sizes in case.others():
        case.demand(f"convert, {sizes}", new, sizes=sizes)
        case.done.append("other sizes")
    if rng.random() < 0.3:
        demand_same("profit='never'", case.run(case.model), case.run(converted(profit="never")))
    case.done.append("symbolic_trace" if not outside else "outside autocast")
    if "freeze" in case.features and not case.grad and not outside and rng.random() < 0.6:
        _frozen(case, gm, converted(freeze=True))


def _frozen(case: _Case, gm: Any, new: Any) -> None:
    """A graph whose weights are frozen, converted from `gm`."""
    report = new.meta["fp8fx_report"]
    if not case.program.around:
        demand_rows("frozen", case.program, report, True)
    case.demand("frozen", new, report=report)
    case.demand("frozen, other values", new, report=report, values=1)
    for sizes in case.others():
        case.demand(f"frozen, {sizes}", new, report=report, sizes=sizes)
    case.done.append("merged" if any("one GEMM" in row.remark for row in report.rows) else "frozen")
    if (
        gm is case.model and report.rewritten and case.rng.random() < 0.6
    ):  # a traced one has buffers' views as constants of their own
        _change(case)
        new.load_state_dict(case.model.state_dict())
        case.demand("reloaded", new, report=report)
        case.done.append("reloaded")


def _change(case: _Case) -> None:
    """Gives the model other weights, in place; siblings' amaxes differ as before."""
    with torch.no_grad():
        for x in case.model.state_dict().values():
            x.mul_(-1.5)


def _export(case: _Case) -> None:
    """torch.export, which keeps no checkpoint, nor what it recomputes: then without gradients."""
    program = case.program
    kept = case.grad and program.traceable
    case = replace(case, grad=kept)
    inputs, shapes = program.arguments(kept), None
    if program.sizes:
        other = program.arguments(kept, {name: size + 1 for name, size in program.sizes.items()})
        shapes = tuple(
            {d: torch.export.Dim.AUTO for d in range(x.dim()) if x.shape[d] != y.shape[d]}
            for x, y in zip(inputs, other, strict=True)
        )
    with torch.set_grad_enabled(kept), program.context():
        try:
            exported = torch.export.export(case.model, tuple(inputs), dynamic_shapes=shapes)
        except RuntimeError:
            case.done.append("torch does not export it")
            return
        new = convert(exported, config=case.config)
    demand_rows("export", program, new.meta["fp8fx_report"], False)
    case.demand("export", new)
    plain = exported.module()
    for sizes in case.others():
        try:  # torch.export takes no sizes of 0 and 1, nor what the graph is found to be particular about
            case.run(plain, sizes=sizes)
        except Exception:
            continue
        case.demand(f"export, {sizes}", new, sizes=sizes)
        case.done.append("dynamic export")
    case.done.append("export")


def _compiles(case: _Case, *sizes: Mapping[str, int]) -> int:
    """How many graphs are compiled for these sizes where nothing is rewritten; 0 where torch itself fails."""
    counted = Counted()
    torch._dynamo.reset()
    call = torch.compile(case.model, backend=counted, fullgraph=True, dynamic=True if case.program.sizes else None)
    try:
        for given in sizes or (case.program.sizes,):
            case.run(call, sizes=given)
    except Exception:
        return 0
    return counted.graphs


def _compile(case: _Case) -> None:
    """torch.compile, for other sizes too, and frozen where nobody asks for gradients."""
    program, rng = case.program, case.rng
    never = rng.random() < 0.1
    freeze = "freeze" in case.features and not case.grad and not never and rng.random() < 0.5
    others = case.others()
    kind = Backend if case.compiler == "inductor" else Lowered
    backend = kind(replace(case.config, profit="never" if never else "always", freeze=freeze))
    torch._dynamo.reset()
    call = torch.compile(case.model, backend=backend, fullgraph=True, dynamic=True if program.sizes else None)
    try:
        found = case.run(call)
    except Exception:
        if _compiles(case):
            raise
        case.done.append("torch does not compile it")
        return
    if never:
        demand_close("compile, profit='never'", case.run(case.model), found, 20)
        case.done.append("compile")
        return
    report: Report | None = Report.merged(backend.reports)
    demand_rows("compile", program, report, True)
    report = report if freeze else None
    case.demand("compile", call, report=report, close=True)
    case.done += ["compile", "frozen compile"] if freeze else ["compile"]
    for sizes in others:
        before = len(backend.reports)
        case.run(call, sizes=sizes)
        report = backend.reports[-1] if freeze and len(backend.reports) > before else report
        case.demand(f"compile, {sizes}", call, report=report, close=True, sizes=sizes)
        case.done.append("dynamic compile")
    if others and (graphs := len(backend.reports)) > (least := _compiles(case, program.sizes, *others)):
        raise DisagreementError(f"compile: {graphs} compilations for {others}, without the rewrite {least}")
    if report is not None and report.rewritten and not others:
        _thawed(case, call, report)


def _thawed(case: _Case, call: Callable[..., Any], report: Report) -> None:
    """A compiled model whose weights are frozen: other inputs, and other weights."""
    case.demand("frozen compile, other values", call, report=report, close=True, values=1)
    if all("not frozen" in row.remark for row in report.rewritten):
        return
    _change(case)
    if case.rng.random() < 0.5:
        fp8fx.refresh(case.model)
    case.demand("frozen compile, other weights", call, report=report, close=True)
    case.done.append("refreshed compile")


def check(program: Program, compiler: str, features: Collection[str] = FEATURES) -> list[str]:
    """Holds one program against itself; returns what was compared.

    Raises:
        DisagreementError, or whatever one of the ways raised that the module itself does not.
    """
    rng = random.Random(program.seed)
    recipe, grad = rng.choice(sorted(RECIPES)), rng.random() < (0.15 if compiler == "inductor" else 0.4)
    config = Config(recipe=recipe, convolutions=True, routers=True, profit="always")
    case = _Case(program, compiler, features, rng, grad, config, program.model())
    try:
        plain = case.run(case.model)
    except RuntimeError:
        if not grad:
            raise
        case.grad = False
        plain = case.run(case.model)
    hand = case.by_hand()
    assert hand is not None
    kinds = [
        {name: (x.shape, x.dtype) for name, x in one.results.items() if name.startswith("output")}
        for one in (plain, hand)
    ]
    if kinds[0] != kinds[1]:
        raise DisagreementError(f"by hand: {kinds[1]}, as written {kinds[0]}")
    if program.traceable:
        _convert(case)
    if rng.random() < 0.1 or not program.traceable:
        _export(case)
    if compiler == "inductor" or (compiler == "aot_eager" and (rng.random() < 0.12 or not program.traceable)):
        _compile(case)
    case.done += [
        name
        for name, there in (("gradients", case.grad), ("autocast", program.around), ("sizes", program.sizes))
        if there
    ]
    return case.done


def attempt(
    seed: int, compiler: str, device: str = "cpu", features: Collection[str] = FEATURES
) -> tuple[list[str], str]:
    """What was compared of one graph, and how it failed: its source and the error, or nothing."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    program = write(seed, features)
    try:
        if device != "cpu":
            torch.set_default_device(device)
        return check(program, compiler, features), ""
    except Exception:  # whatever it is, it is what we look for
        return ["failed"], f"seed {seed}\n{program.source}{traceback.format_exc(limit=-4)}"
    finally:
        torch.set_default_device(None)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description="random modules: eager, convert and compile must agree"
    )
    parser.add_argument("--graphs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the first graph; the next have the next")
    parser.add_argument("--compile", choices=("aot_eager", "inductor", "none"), default="aot_eager")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--features",
        nargs="*",
        choices=FEATURES,
        default=list(FEATURES),
        help="what the modules may have besides linears",
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    options = parser.parse_args()
    one = functools.partial(attempt, compiler=options.compile, device=options.device, features=options.features)
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
