"""The account of a rewrite: every matmul that was rewritten and every one that was not, with its reason."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate

from fp8fx.executors.registry import resolve
from fp8fx.graph.values import traced_size
from fp8fx.linears.matches import GroupedMatch, LinearMatch, Refusal
from fp8fx.pipeline import Rewrite
from fp8fx.recipes.formats import block_size
from fp8fx.recipes.recipe import RECIPES

__all__ = ["Report", "Row"]


@dataclass(frozen=True)
class Row:
    """One matmul.

    Attributes:
        path: the module it stands in; empty for the root.
        name: the weight's name; empty where there is no weight.
        form: how it is written.
        m, k, n: the sizes as text; `?` where they are not known, a symbol where they are dynamic.
        bsz, bsz2: the block sizes; None if it was left alone, or has none.
        op: the op it became; None if it was left alone.
        executor: what that op runs on; None if it was left alone.
        gemms: which of forward, dgrad and wgrad run in FP8, where they run at all.
        reason: why it was left alone; None if it was rewritten.
        remark: of a rewritten linear: what FP8 gains, which of its GEMMs stay in high precision and why, with which siblings it is
            one GEMM, or why it was not frozen; empty where there is nothing to say.
        flops: 2 M K N, with a dynamic M at the value it was traced with; None where a size is not known.
        in_graph: whether a graph has it; else it is a weight of the model that no graph reads.
    """

    path: str
    name: str
    form: str
    m: str
    k: str
    n: str
    bsz: int | None
    bsz2: int | None
    op: str | None
    executor: str | None
    gemms: tuple[str, ...]
    reason: str | None
    remark: str
    flops: int | None
    in_graph: bool = True


Size = int | torch.SymInt | None


def _flops(*sizes: Size) -> int | None:
    flops = 2
    for size in map(traced_size, sizes):
        if size is None:
            return None
        flops *= size
    return flops


def _text(size: Size) -> str:
    return "?" if size is None else str(size)


@dataclass(frozen=True)
class Report:
    """Every matmul seen, in the order of the graph, then the model's linears that no graph has; `str()` is a table with totals.

    Attributes:
        rows: one a matmul.
        graphs: how many graphs they came from.
        failures: what stopped the rewrite of a graph, which was left as it is; its matmuls are not among the rows.
        skipped: the passes over a compiled graph that failed, and why; it was compiled without them.
        values: how many values the weights of the model's linears have; 0 if only graphs are known.
        unseen_values: how many of these are weights that no graph reads.
    """

    rows: tuple[Row, ...]
    graphs: int = 1
    failures: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    values: int = 0
    unseen_values: int = 0

    @classmethod
    def of(cls, rewrite: Rewrite) -> Report:
        """The account of a finished rewrite."""
        rows = {match.node: _rewritten(match, rewrite) for match in rewrite.matches}
        rows |= {refusal.node: _refused(refusal) for refusal in rewrite.refusals}
        return cls(tuple(rows[node] for node in rewrite.seen))

    @classmethod
    def merged(cls, reports: Iterable[Report]) -> Report:
        """One report of several graphs."""
        reports = list(reports)
        parts = [r.rows for r in reports], [r.failures for r in reports], [r.skipped for r in reports]
        rows, failures, skipped = (tuple(itertools.chain(*part)) for part in parts)
        return cls(
            rows,
            graphs=sum(report.graphs for report in reports),
            failures=failures,
            skipped=skipped,
            values=sum(report.values for report in reports),
            unseen_values=sum(report.unseen_values for report in reports),
        )

    @property
    def rewritten(self) -> tuple[Row, ...]:
        """The matmuls that run in FP8."""
        return tuple(row for row in self.rows if row.reason is None)

    @property
    def refused(self) -> tuple[Row, ...]:
        """The matmuls that were left alone."""
        return tuple(row for row in self.rows if row.reason is not None)

    @property
    def flops_share(self) -> float | None:
        """Rewritten FLOPs over all matmul FLOPs, 0 to 1; None if a size is not known, as of a linear in no graph, or without any matmul."""
        flops = [row.flops for row in self.rows]
        total = sum(f for f in flops if f is not None)
        if None in flops or total == 0:
            return None
        return sum(row.flops or 0 for row in self.rewritten) / total

    @property
    def summary(self) -> str:
        """The totals, in a line."""
        failed = [f"a graph was left as it is, its rewrite failed: {failure}" for failure in self.failures]
        failed += [f"a graph was compiled without a pass that failed, {failure}" for failure in self.skipped]
        return "; ".join([self._totals, *failed] if self.rows or not failed else ["nothing was rewritten", *failed])

    @property
    def _totals(self) -> str:
        if not self.rows:
            return "nothing was rewritten: no matmul was seen (a fused call hides its linears: see docs/limitations.md)"
        share = self._why_unknown if self.flops_share is None else f"{self.flops_share:.1%}"
        done, seen = len(self.rewritten), len(self.rows)
        count = f"{done} of {seen} matmuls rewritten" if done else f"nothing was rewritten: 0 of {seen} matmuls"
        return f"{count}, share of the matmul FLOPs: {share}"

    @property
    def _why_unknown(self) -> str:
        unseen = sum(not row.in_graph for row in self.rows)
        if not unseen:
            return "unknown (pass example inputs)"
        linears = "1 linear is" if unseen == 1 else f"{unseen} linears are"
        return f"unknown ({linears} in no graph, with {self.unseen_values / max(self.values, 1):.1%} of the linears' weights)"

    def __str__(self) -> str:
        headers = ("module", "form", "M x K x N", "bsz", "bsz2", "op", "executor", "in FP8", "left alone because")
        table = [
            (
                r.path or r.name,
                r.form,
                f"{r.m} x {r.k} x {r.n}",
                r.bsz,
                r.bsz2,
                r.op,
                r.executor,
                ", ".join(r.gemms),
                r.reason or r.remark,
            )
            for r in self.rows
        ]
        lines = [tabulate(table, headers=headers, disable_numparse=True)] if table else []
        return "\n".join([*lines, self.summary])


def _where(found: LinearMatch | Refusal) -> dict[str, Any]:
    """What a rewritten matmul's row and a refused one's have in common."""
    return {
        "path": found.path,
        "name": found.name,
        "form": found.spelling,
        "m": _text(found.m),
        "k": _text(found.k),
        "n": _text(found.n),
        "flops": _flops(found.m, found.k, found.n),
    }


def _rewritten(match: LinearMatch, rewrite: Rewrite) -> Row:
    device, config, choice, grouped = (
        match.tensor.device,
        rewrite.config,
        rewrite.choices.get(match.node),
        isinstance(match, GroupedMatch),
    )
    return Row(
        **_where(match),
        bsz=None if grouped else block_size(match.k),
        bsz2=None if grouped else block_size(match.n),
        op=f"{'grouped_mm' if grouped else 'matmul'}_fp8_{config.recipe}",
        executor=config.executor if device.type == "meta" else resolve(config.executor, device, groups=grouped).name,
        gemms=RECIPES[config.recipe].gemms if choice is None else choice.fp8,
        reason=None,
        remark="; ".join(filter(None, ("" if choice is None else choice.remark, *rewrite.remarks.get(match.node, ())))),
    )


def _refused(refusal: Refusal) -> Row:
    return Row(
        **_where(refusal), bsz=None, bsz2=None, op=None, executor=None, gemms=(), reason=str(refusal.reason), remark=""
    )
