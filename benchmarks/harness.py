"""What the benchmarks share: a process of its own for every contender, timing, the account of kernel time, results on
disk."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

__all__ = ["arguments", "await_turn", "compare", "contend", "environment", "kernel_times", "milliseconds", "save"]

RESULTS = Path(__file__).parent / "results"
PATIENCE = 1800.0
_KINDS = (  # of a kernel, by its name; the first that fits
    ("attention", r"fmha|flash|sdpa|cudnn"),
    ("GEMM", r"nvjet|gemm|gemv|cutlass|wgmma|triton_tem"),
    ("quantize", r"amax|abs_|reciprocal|float8|scaled_mm"),
    ("other", r""),
)


def environment() -> dict[str, str]:
    """Device, versions and date."""
    versions = {}
    for package in ("torch", "triton", "torchao", "bitsandbytes", "transformers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": torch.cuda.get_device_name(),
        "cuda": str(torch.version.cuda),
        **versions,
        "date": date.today().isoformat(),
    }


def milliseconds(call: Callable[[], Any], batches: int = 7, least: float = 200.0, warmup: int = 5) -> float:
    """The median time of one call on the device, by events around batches of calls that follow each other as in a
    training loop.

    Args:
        call: what is timed.
        batches: how many are timed.
        least: milliseconds that a batch takes at least, so that the start of the first call weighs little.
        warmup: calls before, which also tell how many make a batch.
    """

    def batch(calls: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize()
        spent: float = start.elapsed_time(end) / calls
        return spent

    batch(warmup)
    calls = math.ceil(least / batch(warmup))
    return statistics.median(batch(calls) for _ in range(batches))


def kernel_times(call: Callable[[], Any], calls: int = 5) -> tuple[dict[str, float], list[tuple[str, float, float]]]:
    """Kernel milliseconds of one call by kind, and each kernel's own with its count, longest first; means of several
    calls."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    kinds: Counter[str] = Counter()
    kernels = []
    for event in profiler.key_averages():
        spent = event.self_device_time_total / 1e3 / calls
        kinds[next(kind for kind, pattern in _KINDS if re.search(pattern, event.key))] += spent
        kernels.append((event.key, spent, event.count / calls))
    return dict(kinds), sorted(kernels, key=lambda kernel: -kernel[1])


class _Contender:
    """A process of its own, with empty compile caches: `python -m module --one case contender`."""

    def __init__(self, module: str, case: str, contender: str, patience: float) -> None:
        self.patience, self.started, self.late = patience, time.monotonic(), False
        self.files = tempfile.TemporaryDirectory()
        caches = {
            "TORCHINDUCTOR_CACHE_DIR": f"{self.files.name}/inductor",
            "TRITON_CACHE_DIR": f"{self.files.name}/triton",
        }
        self.errors = open(f"{self.files.name}/stderr", "w+")  # noqa: SIM115 - closed with the process
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, "--one", case, contender],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env={**os.environ, **caches},
        )

        self.compiled = threading.Thread(target=self._read, daemon=True)
        self.compiled.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        while (line := self.process.stdout.readline()) and line != _READY:
            pass

    def until_ready(self) -> None:
        """Waits until it calls `await_turn`, or ends; ends it where that takes too long."""
        self.compiled.join(self.started + self.patience - time.monotonic())
        if self.compiled.is_alive():
            self.late = True
            self.process.kill()

    def result(self) -> dict[str, Any]:
        """Gives it its turn and returns the JSON of its last line, or {"error": ...}."""
        # Of one that was ended nothing is read: workers of its compiler may hold its output open.
        out = "" if self.late else self.process.communicate("\n")[0]
        self.errors.seek(0)
        with self.errors, self.files:
            if self.late:
                self.process.wait()
                return {"error": f"had not compiled after {self.patience:.0f} s"}
            if self.process.returncode:
                return {"error": (self.errors.read().strip().splitlines() or ["no output"])[-1]}
        result: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
        return result


_READY = "ready\n"


def await_turn() -> None:
    """Called by a contender when it has compiled and is about to measure: waits until no other runs."""
    print(_READY, end="", flush=True)
    sys.stdin.readline()


def contend(
    module: str, runs: Sequence[tuple[str, str]], together: int = 1, patience: float = PATIENCE
) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    """Runs each contender in a process of its own; each measures while no other of its batch does anything.

    Args:
        module: what is run, as `python -m module --one case contender`; it calls `await_turn` and prints a JSON as its
            last line.
        runs: each a case and a contender.
        together: how many compile at once. Several take a fraction of the time, but make their own compile times worth
            nothing.
        patience: seconds after which one that has not compiled is ended, which is its error.

    Yields:
        Each case as soon as its last contender is done, with the JSON of each by name, or {"error": its last line of
        stderr}.
    """
    results: dict[str, dict[str, dict[str, Any]]] = {}
    left = Counter(case for case, _ in runs)
    for first in range(0, len(runs), together):
        batch = [
            (case, name, _Contender(module, case, name, patience)) for case, name in runs[first : first + together]
        ]
        for *_, contender in batch:
            contender.until_ready()
        for case, name, contender in batch:
            result = results.setdefault(case, {})[name] = contender.result()
            figures = {key: x for key, x in result.items() if not isinstance(x, (dict, list))}
            print(
                f"{case}, {name}: {json.dumps(figures)}", file=sys.stderr, flush=True
            )  # not lost with a run cut short
            left[case] -= 1
            if not left[case]:
                yield case, results[case]


def arguments(doc: str | None, cases: Iterable[str], contenders: Iterable[str]) -> argparse.Namespace:
    """A benchmark's command line: `cases`, `contenders`, `together`, `patience`, and `one` case and contender, which
    `contend` runs."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=tuple(cases), default=list(cases))
    parser.add_argument("--contenders", nargs="+", choices=tuple(contenders), default=list(contenders))
    parser.add_argument(
        "--together", type=int, default=1, help="how many compile at once; above 1 no compile time is given"
    )
    parser.add_argument("--warm", action="store_true", help="torch and CUDA have been read from disk already")
    parser.add_argument(
        "--patience", type=float, default=PATIENCE, help="seconds after which one that has not compiled is ended"
    )
    parser.add_argument(
        "--one", nargs=2, metavar=("CASE", "CONTENDER"), help="run one contender here and print its JSON"
    )
    return parser.parse_args()


def compare(
    name: str,
    runs: Sequence[tuple[str, str]],
    given: argparse.Namespace,
    table: Callable[[dict[str, dict[str, Any]]], str],
) -> None:
    """Has the contenders of benchmarks.<name> run, prints each case's table and writes its figures to
    results/<name>_<case>.json.

    Compile times are kept where one compiles at a time, after a run that is not counted: the first process reads torch
    and CUDA from disk. `given` is what `arguments` gave.
    """
    module = f"benchmarks.{name}"
    if given.together == 1 and not given.warm:
        dict(contend(module, runs[:1], patience=given.patience))
    print(environment())
    for case, rows in contend(module, runs, given.together, given.patience):
        if given.together > 1:
            for row in rows.values():
                row.pop("compile_s", None)
        print(f"\n{case}\n{table(rows)}", flush=True)
        save(f"{name}_{case}", {"case": case, "contenders": rows})


def save(name: str, results: dict[str, Any]) -> Path:
    """Writes the raw results to benchmarks/results/."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), **results}, indent=1) + "\n")
    return path
