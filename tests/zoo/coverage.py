"""Verdicts as tables: in the terminal, and as docs/coverage.md."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import date
from typing import Any

import torch
import transformers
from tabulate import tabulate

from tests.zoo.accuracy import ALLOWED

__all__ = ["markdown", "table"]

_PAGE = """# Coverage

Real architectures, built small from their configurations (two layers, random weights, no dropout) and rewritten by `torch.compile(model,
backend="fp8")` by both recipes under `profit="always"`, in inference and in a training step. {lowering}. Written by `{command}` on
{device}, torch {torch}, transformers {transformers}, {date}: {passed} of {count} pass.

## What runs in FP8

Of weights: the share of FP8 in the FLOPs of matmuls with a weight for an operand. Of all: in those of every matmul, attention's scores
and values included. The FLOPs are counted as the eager model runs, so that a linear that no graph of Dynamo's shows counts as left alone.
Convolutions count in neither. The reasons are shortened; [limitations](limitations.md) explains them. Where it runs in FP8, models of
experts are compiled in bfloat16, all others in float32.

{coverage}

Below 95 % of weights: {short}.

## Accuracy

Signal over noise in dB, of the output and of all gradients together, of a training step against the eager model in float64: the eager
model in bfloat16, `mixed`, `global`. Then the worst error of all runs, in units of what the eager model in bfloat16 errs there: of the
output as a whole ({output:.0f} are allowed), of any of its rows ({row:.0f}), of any parameter's gradient ({gradient:.0f}). Graphs: of
inference and of training. Compilations: in two inferences and two training steps by `mixed`, by `global`, and with `backend="eager"`,
which must be as many.

{accuracy}

### The rule

{rule}"""


def _brief(reason: str) -> str:
    return re.split("[:;,]", reason)[0]


def _reasons(verdict: dict[str, Any]) -> str:
    return "; ".join(f"{count} {_brief(reason)}" if count else reason for reason, count in verdict["refused"].items())


def _coverage(verdict: dict[str, Any]) -> tuple[str, ...]:
    done = f"{verdict['rewritten']} of {verdict['seen']}"
    return verdict["name"], done, f"{verdict['weights_share']:.1%}", f"{verdict['share']:.1%}", _reasons(verdict)


def _decibels(verdict: dict[str, Any], name: str) -> str:
    runs = [verdict["half"], *(run["accuracy"] for run in verdict["runs"] if run["kind"] == "training")]
    return " / ".join(f"{accuracy[name]:.1f}" for accuracy in runs)


def _worst(verdict: dict[str, Any], name: str) -> str:
    return f"{max(run['accuracy']['times'].get(name, 0.0) for run in verdict['runs']):.1f}"


def _graphs(verdict: dict[str, Any]) -> str:
    return " / ".join(str(next(run["graphs"] for run in verdict["runs"] if run["kind"] == kind)) for kind in ("inference", "training"))


def _compilations(verdict: dict[str, Any]) -> str:
    def total(recipe: str, which: str) -> int:
        return sum(run[which] for run in verdict["runs"] if run["recipe"] == recipe)

    return " / ".join(str(total(*one)) for one in (("mixed", "compilations"), ("global", "compilations"), ("mixed", "expected")))


def _accuracy(verdict: dict[str, Any]) -> tuple[str, ...]:
    decibels = _decibels(verdict, "output_db"), _decibels(verdict, "gradient_db")
    times = (_worst(verdict, name) for name in ALLOWED)
    return verdict["name"], *decibels, *times, _graphs(verdict), _compilations(verdict), "; ".join(verdict["problems"]) or "passes"


_COVERAGE = ("model", "in FP8", "of weights", "of all", "left alone")
_ACCURACY = ("model", "output, dB", "gradients, dB", *(f"worst {name}" for name in ALLOWED), "graphs", "compilations", "verdict")


def _rows(verdicts: Sequence[dict[str, Any]], row: Any, width: int) -> list[tuple[str, ...]]:
    """A verdict that is an error is a row with it at the end."""
    return [(v["name"], *[""] * (width - 2), v["error"]) if "error" in v else row(v) for v in verdicts]


def table(verdicts: Sequence[dict[str, Any]]) -> str:
    """For the terminal. `verdicts` are Verdicts as dictionaries, or a name and an error."""
    tables = (_rows(verdicts, _coverage, len(_COVERAGE)), _COVERAGE), (_rows(verdicts, _accuracy, len(_ACCURACY)), _ACCURACY)
    return "\n\n".join(tabulate(rows, headers, disable_numparse=True) for rows, headers in tables)


def markdown(verdicts: Sequence[dict[str, Any]], device: str, eager: bool, rule: str) -> str:
    """docs/coverage.md; `eager` is without Inductor, `rule` says what accuracy is asked for."""
    short = [v["name"] for v in verdicts if "error" not in v and v["weights_share"] < 0.95]
    tables = (_rows(verdicts, _coverage, len(_COVERAGE)), _COVERAGE), (_rows(verdicts, _accuracy, len(_ACCURACY)), _ACCURACY)
    coverage, accuracy = (tabulate(rows, headers, tablefmt="pipe", disable_numparse=True) for rows, headers in tables)
    return _PAGE.format(
        device=device,
        lowering="The rewritten graphs ran as they are, without Inductor" if eager else "Inductor compiled them",
        command="python -m tests.zoo --eager" if eager else "python -m tests.zoo",
        torch=torch.__version__,
        transformers=transformers.__version__,
        date=date.today().isoformat(),
        passed=sum("error" not in v and not v["problems"] for v in verdicts),
        count=len(verdicts),
        coverage=coverage,
        short=", ".join(short) or "none",
        accuracy=accuracy,
        rule=rule,
        **ALLOWED,
    )
