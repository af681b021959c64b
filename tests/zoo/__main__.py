"""The zoo: every architecture through the backend, each in a process of its own, and docs/coverage.md written from what
they did.

    python -m tests.zoo [--only NAME ...] [--device cuda] [--jobs 8] [--eager] [--json FILE]

Exits with an error if one does not pass or crashes. With --only, docs/coverage.md stays as it is. What it says of
tensor cores is what benchmarks/results/zoo_h100.json holds, which --json wrote there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from tests.zoo import accuracy
from tests.zoo.coverage import markdown, passed, record, table
from tests.zoo.models import ZOO

ROOT = Path(__file__).parents[2]
COVERAGE, ON_TENSOR_CORES = ROOT / "docs" / "coverage.md", "benchmarks/results/zoo_h100.json"
SLOWEST = (
    "Mamba",
    "Mixtral-eager",
    "T5",
    "Whisper",
    "Swinv2",
    "CLIP",
)  # begin with these, so that none runs on alone at the end


def _judged(name: str, device: str, jobs: int, seconds: float, eager: bool) -> dict[str, Any]:
    """The Verdict of a process of its own; where there is none, why."""
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    command = [sys.executable, "-W", "ignore", "-m", "tests.zoo.judge", name, device, *(["eager"] if eager else [])]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={"TORCHINDUCTOR_COMPILE_THREADS": threads, **os.environ},
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"name": name, "error": f"not done after {seconds:.0f} s"}
    if done.returncode == 0:
        verdict: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return verdict
    print(done.stderr, file=sys.stderr)
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return {"name": name, "error": f"crashed (exit code {done.returncode}): {last}"}


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.zoo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=tuple(ZOO), metavar="NAME", help=f"of {', '.join(ZOO)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=int, default=1, help="how many processes at once")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds that an architecture may take")
    parser.add_argument(
        "--eager", action="store_true", help="runs the rewritten graphs as they are, without Inductor: minutes for all"
    )
    parser.add_argument("--json", type=Path, help="writes the verdicts to this file, too")
    given = parser.parse_args()
    names, verdicts = given.only or list(ZOO), {}
    with ThreadPoolExecutor(given.jobs) as pool:
        order = sorted(names, key=lambda name: name not in SLOWEST)
        for future in as_completed(
            [pool.submit(_judged, name, given.device, given.jobs, given.timeout, given.eager) for name in order]
        ):
            verdict = future.result()
            verdicts[verdict["name"]] = verdict
            said = verdict.get("error") or "; ".join(verdict["problems"]) or f"passes, {verdict['seconds']:.0f} s"
            print(f"{verdict['name']}: {said}", flush=True)
    found = [verdicts[name] for name in names]
    print(table(found))
    kind = torch.cuda.get_device_name() if given.device == "cuda" else "a CPU"
    done = record(found, kind, given.eager)
    if given.json:
        given.json.write_text(json.dumps(done, indent=1) + "\n")
    if not given.only:
        elsewhere = json.loads((ROOT / ON_TENSOR_CORES).read_text())
        COVERAGE.write_text(markdown(done, elsewhere, f"../{ON_TENSOR_CORES}", textwrap.dedent(accuracy.__doc__ or "")))
    failed = [v["name"] for v in found if not passed(v)]
    if failed:
        raise SystemExit(f"{len(failed)} of {len(found)} do not pass: {', '.join(failed)}")


if __name__ == "__main__":
    main()
