"""The account of a rewrite: every matmul that was rewritten and every one that was not, with its reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from fp8fx.executors.registry import resolve
from fp8fx.graph.masks import MaskedAttention
from fp8fx.graph.values import traced_size
from fp8fx.linears.matches import GroupedMatch, LinearMatch, Refusal, Size
from fp8fx.ops.register import name_of
from fp8fx.pipeline import Rewrite
from fp8fx.reasons import Reason
from fp8fx.recipes.formats import block_size
from fp8fx.recipes.recipe import RECIPES

__all__ = ["Report", "Row"]


@dataclass(frozen=True)
class Row:
    """One matmul of a report.

    >>> import fp8fx
    >>> from fp8fx.reasons import OptionReason
    >>> from torch import nn
    >>> head = nn.Sequential(nn.Linear(64, 32))
    >>> (row,) = fp8fx.convert(head, exclude="0").meta["fp8fx_report"].rows
    >>> row.name, row.k, row.n, row.op, row.reason
    ('0.weight', '64', '32', None, "excluded by '0'")
    >>> row.kind is OptionReason.EXCLUDED
    True

    Attributes:
        path: the module it stands in; empty for the root.
        name: the weight's name; empty if there is no weight.
        form: how it is written.
        m, k, n: the sizes as text: `?` if a size is not known, a symbol if it is dynamic.
        bsz, bsz2: the block sizes; None if it was left alone, or has none.
        op: the op it became; None if it was left alone.
        executor: what that op runs on; None if it was left alone.
        gemms: which of forward, dgrad and wgrad run in FP8, if they run at all.
        reason: why it was left alone, as text; None if it was rewritten.
        remark: of a rewritten linear: what FP8 gains, which of its GEMMs stay in high precision and why, with which
            siblings it is one GEMM, or why it was not frozen; empty if there is nothing to say.
        flops: 2 M K N, with a dynamic M at the value it was traced with; None if a size is not known.
        in_graph: whether a graph has it; otherwise it is a weight of the model that no graph reads.
        kind: what kind of reason `reason` is, for programs: a member of `fp8fx.reasons`; None if it was rewritten.
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
    kind: Reason | None = None


_HEADERS = ("module", "form", "M x K x N", "bsz", "bsz2", "op", "executor", "in FP8", "left alone because")


def _cells(row: Row) -> tuple[object, ...]:
    """A row of the printed table, one cell for each of its headers."""
    return (
        row.path or row.name,
        row.form,
        f"{row.m} x {row.k} x {row.n}",
        row.bsz,
        row.bsz2,
        row.op,
        row.executor,
        ", ".join(row.gemms),
        row.reason or row.remark,
    )


@dataclass(frozen=True)
class Report:
    """Every matmul seen, in the order of the graph, then the model's linears that no graph has.

    `str()` is a table with totals.

    >>> import fp8fx, torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
    >>> report = fp8fx.convert(model, [torch.randn(16, 64)], exclude="2").meta["fp8fx_report"]
    >>> print(report)
    module    form    M x K x N      bsz    bsz2    op                executor    in FP8    left alone because
    --------  ------  -------------  -----  ------  ----------------  ----------  --------  --------------------
    0         Linear  16 x 64 x 128  64     128     matmul_fp8_mixed  simulated   forward
    2         Linear  16 x 128 x 32                                                         excluded by '2'
    1 of 2 matmuls rewritten, share of the matmul FLOPs: 66.7%
    >>> [row.name for row in report.rewritten], [row.name for row in report.refused]
    (['0.weight'], ['2.weight'])
    >>> report.summary
    '1 of 2 matmuls rewritten, share of the matmul FLOPs: 66.7%'

    Attributes:
        rows: one a matmul.
        graphs: how many graphs they came from.
        failures: what stopped the rewrite of a graph, which was left as it is; its matmuls are not among the rows.
        skipped: the passes over a compiled graph that failed, and why; it was compiled without them.
        values: how many values the weights of the model's linears have; 0 if only graphs are known.
        unseen_values: how many of these are weights that no graph reads.
        attention: one a call of attention that had a mask.
    """

    rows: tuple[Row, ...]
    graphs: int = 1
    failures: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    values: int = 0
    unseen_values: int = 0
    attention: tuple[MaskedAttention, ...] = ()

    @classmethod
    def of(cls, rewrite: Rewrite) -> Report:
        """The account of a finished rewrite."""
        rows = {match.node: _rewritten(match, rewrite) for match in rewrite.matches}
        rows |= {refusal.node: _refused(refusal) for refusal in rewrite.refusals}
        return cls(tuple(rows[node] for node in rewrite.seen), attention=tuple(rewrite.attention))

    @classmethod
    def merged(cls, reports: Iterable[Report]) -> Report:
        """One report of several graphs."""
        reports = list(reports)
        return cls(
            tuple(row for report in reports for row in report.rows),
            graphs=sum(report.graphs for report in reports),
            failures=tuple(failure for report in reports for failure in report.failures),
            skipped=tuple(failure for report in reports for failure in report.skipped),
            values=sum(report.values for report in reports),
            unseen_values=sum(report.unseen_values for report in reports),
            attention=tuple(row for report in reports for row in report.attention),
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
        """Rewritten FLOPs over all matmul FLOPs, 0 to 1.

        None if a size is not known, such as that of a linear in no graph, or if there is no matmul.
        """
        total = 0
        for row in self.rows:
            if row.flops is None:
                return None
            total += row.flops
        if total == 0:
            return None
        return sum(row.flops or 0 for row in self.rewritten) / total

    @property
    def summary(self) -> str:
        """The totals, in a line."""
        return "; ".join(self._sentences())

    def _sentences(self) -> Iterator[str]:
        failed = [f"a graph was left as it is, its rewrite failed: {failure}" for failure in self.failures]
        failed += [f"a graph was compiled without a pass that failed, {failure}" for failure in self.skipped]
        if failed and not self.rows:
            yield "nothing was rewritten"
        else:
            yield self._totals
        yield from failed

    @property
    def _totals(self) -> str:
        seen = len(self.rows)
        if seen == 0:
            return "nothing was rewritten: no matmul was seen (a fused call hides its linears: see docs/limitations.md)"
        done = len(self.rewritten)
        count = f"{done} of {seen} matmuls rewritten" if done else f"nothing was rewritten: 0 of {seen} matmuls"
        share = self._why_unknown if self.flops_share is None else f"{self.flops_share:.1%}"
        return f"{count}, share of the matmul FLOPs: {share}"

    @property
    def _why_unknown(self) -> str:
        """Why there is no share of the FLOPs."""
        unseen = sum(not row.in_graph for row in self.rows)
        if unseen == 0:
            return "unknown (pass example inputs)"
        linears = "1 linear is" if unseen == 1 else f"{unseen} linears are"
        weights = self.unseen_values / max(self.values, 1)
        return f"unknown ({linears} in no graph, with {weights:.1%} of the linears' weights)"

    def __str__(self) -> str:
        lines = [self.summary, *self._masks()]
        if self.rows:
            lines.insert(0, tabulate([_cells(row) for row in self.rows], headers=_HEADERS, disable_numparse=True))
        return "\n".join(lines)

    def _masks(self) -> Iterator[str]:
        """A line for all calls of attention whose masks are alike."""
        alike = Counter((row.mask, row.became, row.reason) for row in self.attention)
        for (mask, became, reason), count in alike.items():
            calls = f"{count} calls" if count > 1 else "1 call"
            yield f"attention: {calls} with a mask {mask} -> {became or f'left alone: {reason}'}"


def _flops(*sizes: Size) -> int | None:
    """Of a matmul of these M, K and N; None if a size is not known."""
    flops = 2
    for size in map(traced_size, sizes):
        if size is None:
            return None
        flops *= size
    return flops


def _text(size: Size) -> str:
    return "?" if size is None else str(size)


def _where(matmul: LinearMatch | Refusal) -> dict[str, Any]:
    """What a rewritten matmul's row and a refused one's have in common."""
    return {
        "path": matmul.path,
        "name": matmul.name,
        "form": matmul.spelling,
        "m": _text(matmul.m),
        "k": _text(matmul.k),
        "n": _text(matmul.n),
        "flops": _flops(matmul.m, matmul.k, matmul.n),
    }


def _executor(match: LinearMatch, name: str) -> str:
    """What the executor that the user asked for is on the weight's device."""
    device = match.tensor.device
    if device.type == "meta":
        return name
    return resolve(name, device, groups=isinstance(match, GroupedMatch)).name


def _rewritten(match: LinearMatch, rewrite: Rewrite) -> Row:
    config = rewrite.config
    recipe = match.own_recipe or config.recipe
    is_grouped = isinstance(match, GroupedMatch)
    choice = rewrite.choices.get(match.node)
    weighed = () if choice is None else choice.remarks
    return Row(
        **_where(match),
        bsz=None if is_grouped else block_size(match.k),
        bsz2=None if is_grouped else block_size(match.n),
        op=name_of("grouped_mm" if is_grouped else "matmul", recipe),
        executor=_executor(match, config.executor),
        gemms=RECIPES[recipe].gemms if choice is None else choice.fp8,
        reason=None,
        remark="; ".join(map(str, (*weighed, *rewrite.remarks.get(match.node, ())))),
    )


def _refused(refusal: Refusal) -> Row:
    return Row(
        **_where(refusal),
        bsz=None,
        bsz2=None,
        op=None,
        executor=None,
        gemms=(),
        reason=str(refusal.reason),
        remark="",
        kind=refusal.reason.kind,
    )
