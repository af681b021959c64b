"""Verdicts as tables: in the terminal, and as docs/coverage.md."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from typing import Any

import torch
import transformers
from tabulate import tabulate

from tests.zoo.accuracy import ALLOWED
from tests.zoo.judge import GOAL, KINDS, RECIPES, SHORT

__all__ = ["markdown", "passed", "record", "table"]

_PAGE = """# Coverage

Real architectures, built small from their configurations (two layers, OPT three, random weights, no dropout) and
rewritten by `torch.compile(model, backend="fp8")` by `mixed` and `global` under `profit="always"`, in inference and
in a training step. {lowering}. Written by `{command}` on {where}: {passed}. Through Inductor on {elsewhere}.

## What runs in FP8

Linears are the matmuls with a weight for an operand. Of weights: the share of FP8 in their FLOPs. Of all: in those of
every matmul, attention's scores and values included. The FLOPs are counted as the eager model runs, so that a linear
that no graph of Dynamo's shows counts as left alone. Convolutions count in neither. The reasons are shortened;
[limitations](limitations.md) explains them. Where it runs in FP8, models of experts are compiled in bfloat16, all
others in float32. {agreement}

{coverage}

An architecture passes with {goal:.0%} of weights or more; these, which cannot, with: {short}.

## Accuracy

Signal over noise in dB, against the eager model in float64, each of the eager model in bfloat16, of `mixed` and of
`global`: of the output in inference, of the output of a training step, and of all its gradients together. Then the
worst error of all runs, in units of what the eager model in bfloat16 errs there: of the output as a whole
({output:.0f} are allowed), of any of its rows ({row:.0f}), of any parameter's gradient ({gradient:.0f}).

{accuracy}

### The rule

{rule}

## Graphs and compilations

Graphs: that the first call compiled, by `mixed` and by `global`. Compilations: in two calls, by `mixed`, by `global`,
and with `backend="eager"`, which must be as many.

{compilations}
"""

_Verdict = Mapping[str, Any]


def _worst(verdict: _Verdict) -> dict[str, Any]:
    """The coverage of the worst run."""
    return min((run["coverage"] for run in verdict["runs"]), key=lambda coverage: coverage["weights_share"])


def _agree(verdict: _Verdict) -> bool:
    return all(run["coverage"] == verdict["runs"][0]["coverage"] for run in verdict["runs"])


def _brief(reason: str) -> str:
    return re.split("[:;,]", reason)[0]


def _coverage(verdict: _Verdict) -> tuple[str, ...]:
    worst = _worst(verdict)
    done = (f"{worst['rewritten']} of {worst[what]}" for what in ("linears", "matmuls"))
    reasons = (f"{count} {_brief(reason)}" if count else reason for reason, count in worst["refused"].items())
    return verdict["name"], *done, f"{worst['weights_share']:.1%}", f"{worst['share']:.1%}", "; ".join(reasons)


def _of(verdict: _Verdict, kind: str) -> list[Any]:
    """The runs of that kind, by recipe."""
    return [
        next(run for run in verdict["runs"] if (run["kind"], run["recipe"]) == (kind, recipe)) for recipe in RECIPES
    ]


def _decibels(verdict: _Verdict, kind: str, name: str) -> str:
    return " / ".join(
        f"{accuracy[name]:.1f}" for accuracy in (verdict["half"], *(run["accuracy"] for run in _of(verdict, kind)))
    )


def _accuracy(verdict: _Verdict) -> tuple[str, ...]:
    decibels = (
        _decibels(verdict, *one)
        for one in (("inference", "output_db"), ("training", "output_db"), ("training", "gradient_db"))
    )
    times = (f"{max(run['accuracy']['times'].get(name, 0.0) for run in verdict['runs']):.1f}" for name in ALLOWED)
    return verdict["name"], *decibels, *times, "; ".join(verdict["problems"]) or "passes"


def _compilations(verdict: _Verdict) -> tuple[str, ...]:
    runs = {kind: _of(verdict, kind) for kind in KINDS}
    graphs = (" / ".join(str(run["graphs"]) for run in runs[kind]) for kind in KINDS)
    counts = (
        " / ".join(map(str, (*(run["compilations"] for run in runs[kind]), runs[kind][0]["expected"])))
        for kind in KINDS
    )
    return verdict["name"], *graphs, *counts


_TABLES: Mapping[str, tuple[Callable[[_Verdict], tuple[str, ...]], tuple[str, ...]]] = {
    "coverage": (_coverage, ("model", "linears in FP8", "matmuls in FP8", "of weights", "of all", "left alone")),
    "accuracy": (
        _accuracy,
        (
            *("model", "inference, dB", "training, dB", "gradients, dB"),
            *(f"worst {name}" for name in ALLOWED),
            "verdict",
        ),
    ),
    "compilations": (
        _compilations,
        ("model", *(f"{what}, {kind}" for what in ("graphs", "compilations") for kind in KINDS)),
    ),
}
"""What a row is, and the headers."""


def _tables(verdicts: Sequence[_Verdict], style: str) -> dict[str, str]:
    """By name; of a verdict that is an error, a row with it at the end."""

    def table(row: Callable[[_Verdict], tuple[str, ...]], headers: tuple[str, ...]) -> str:
        rows = [(v["name"], *[""] * (len(headers) - 2), v["error"]) if "error" in v else row(v) for v in verdicts]
        return tabulate(rows, headers, tablefmt=style, disable_numparse=True)

    return {name: table(*one) for name, one in _TABLES.items()}


def table(verdicts: Sequence[_Verdict]) -> str:
    """For the terminal. `verdicts` are Verdicts as dictionaries, or a name and an error."""
    return "\n\n".join(_tables(verdicts, "simple").values())


def passed(verdict: _Verdict) -> bool:
    """Whether it is neither an error nor has any problem."""
    return "error" not in verdict and not verdict["problems"]


def record(verdicts: Sequence[_Verdict], device: str, eager: bool) -> dict[str, Any]:
    """The verdicts, and what they were given with; `eager` is without Inductor."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "date": date.today().isoformat()}
    return {"device": device, "eager": eager, **versions, "verdicts": verdicts}


def _where(record: Mapping[str, Any]) -> str:
    return f"{record['device']}, torch {record['torch']}, transformers {record['transformers']}, {record['date']}"


def _passed(record: Mapping[str, Any]) -> str:
    return f"{sum(map(passed, record['verdicts']))} of {len(record['verdicts'])} pass"


def _agreement(verdicts: Sequence[_Verdict]) -> str:
    differ = [v["name"] for v in verdicts if "error" not in v and not _agree(v)]
    if not differ:
        return "The four runs of each architecture agree in all of this."
    names = ", ".join(differ)
    return f"The four runs of an architecture agree in all of this, but for those of {names}, where it is of the worst."


def markdown(record: Mapping[str, Any], elsewhere: Mapping[str, Any], file: str, rule: str) -> str:
    """docs/coverage.md.

    Args:
        record: what it is of.
        elsewhere, file: the one made on tensor cores through Inductor, and where it is kept.
        rule: says what accuracy is asked for.
    """
    return _PAGE.format(
        lowering="The rewritten graphs ran as they are, without Inductor"
        if record["eager"]
        else "Inductor compiled them",
        command="python -m tests.zoo --eager" if record["eager"] else "python -m tests.zoo",
        where=_where(record),
        passed=_passed(record),
        elsewhere=f"{_where(elsewhere)}: {_passed(elsewhere)} ([verdicts]({file}))",
        agreement=_agreement(record["verdicts"]),
        goal=GOAL,
        short=", ".join(f"{name} ({least:.0%})" for name, (least, _) in SHORT.items()),
        rule=rule.strip(),
        **_tables(record["verdicts"], "pipe"),
        **ALLOWED,
    )
