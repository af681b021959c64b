"""The report: a row for every matmul, totals, and what is not known said aloud."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fp8fx
from fp8fx.convert import convert
from fp8fx.reasons import OptionReason, WeightReason
from fp8fx.report import Report, Row
from tests.support.capture import Capture


class Model(nn.Module):
    """Two linears, one excluded by name in most tests, and an attention-like product."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(70, 200)
        self.head = nn.Parameter(torch.randn(200, 30))

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return (y @ y.mT) @ (y @ self.head)


def report(model: nn.Module, *example_inputs: Tensor, **options: str) -> Report:
    found: Report = convert(model, example_inputs or None, **options).meta["fp8fx_report"]
    return found


ALONE: dict[str, Any] = {"bsz": None, "bsz2": None, "op": None, "executor": None, "gemms": (), "remark": ""}
"""What every row of a matmul that was left alone has."""

PRODUCT: dict[str, Any] = {"path": "", "name": "", "form": "@", "reason": "activation times activation", **ALONE}
"""What every row of a product of activations has, besides its kind."""


def row(flops: int | None, rewritten: bool, path: str = "fc") -> Row:
    """A made-up row."""
    where: dict[str, Any] = {"path": path, "name": f"{path}.weight", "form": "F.linear", "m": "2", "k": "3", "n": "4"}
    if not rewritten:
        return Row(**where, **ALONE, reason="because", flops=flops)
    op: dict[str, Any] = {"op": "matmul_fp8_mixed", "executor": "simulated", "gemms": ("forward",)}
    return Row(**where, **op, bsz=64, bsz2=64, reason=None, remark="", flops=flops)


def test_rows_by_hand() -> None:
    activations = WeightReason.ACTIVATIONS
    assert report(Model(), torch.randn(5, 70), recipe="global", exclude="up").rows == (
        Row(
            path="up",
            name="up.weight",
            form="Linear",
            m="5",
            k="70",
            n="200",
            **ALONE,
            reason="excluded by 'up'",
            flops=2 * 5 * 70 * 200,
            kind=OptionReason.EXCLUDED,
        ),
        Row(**PRODUCT, m="5", k="200", n="5", flops=2 * 5 * 200 * 5, kind=activations),
        Row(
            path="",
            name="head",
            form="@",
            m="5",
            k="200",
            n="30",
            bsz=256,
            bsz2=64,
            op="matmul_fp8_global",
            executor="simulated",
            gemms=("forward", "dgrad", "wgrad"),
            reason=None,
            remark="",
            flops=2 * 5 * 200 * 30,
            kind=None,
        ),
        Row(**PRODUCT, m="5", k="5", n="30", flops=2 * 5 * 5 * 30, kind=activations),
    )


def test_flops_share_by_hand() -> None:
    found = report(Model(), torch.randn(5, 70), exclude="up")
    total = 5 * 70 * 200 + 5 * 200 * 5 + 5 * 200 * 30 + 5 * 5 * 30
    assert found.flops_share == 5 * 200 * 30 / total
    assert report(nn.Sequential(nn.Linear(3, 4)), torch.randn(2, 3)).flops_share == 1


def test_flops_share_of_made_up_rows() -> None:
    assert Report((row(30, True), row(10, False))).flops_share == 0.75
    assert Report((row(30, False),)).flops_share == 0
    assert Report((row(30, True), row(None, False))).flops_share is None
    assert Report((row(None, True),)).flops_share is None
    assert Report((row(0, True),)).flops_share is None
    assert Report(()).flops_share is None


def test_rewritten_and_refused() -> None:
    rows = (row(1, True, "a"), row(1, False, "b"), row(1, True, "c"))
    assert [r.path for r in Report(rows).rewritten] == ["a", "c"]
    assert [r.path for r in Report(rows).refused] == ["b"]


TABLE = """\
module    form    M x K x N     bsz    bsz2    op                executor    in FP8          left alone because
--------  ------  ------------  -----  ------  ----------------  ----------  --------------  ---------------------------
up        Linear  5 x 70 x 200                                                               excluded by 'up'
          @       5 x 200 x 5                                                                activation times activation
head      @       5 x 200 x 30  256    64      matmul_fp8_mixed  simulated   forward, dgrad
          @       5 x 5 x 30                                                                 activation times activation
1 of 4 matmuls rewritten, share of the matmul FLOPs: 28.4%
"""


def test_the_table() -> None:
    assert f"{report(Model(), torch.randn(5, 70), exclude='up')}\n" == TABLE


def test_sizes_that_are_not_known() -> None:
    found = report(Model())
    assert [(r.m, r.k, r.n) for r in found.rows] == [
        ("?", "70", "200"),
        ("?", "?", "?"),
        ("?", "200", "30"),
        ("?", "?", "?"),
    ]
    assert [r.flops for r in found.rows] == [None] * 4
    assert found.summary == "2 of 4 matmuls rewritten, share of the matmul FLOPs: unknown (pass example inputs)"
    assert "? x 70 x 200" in str(found)


def test_nothing_rewritten_is_said_aloud() -> None:
    found = report(Model(), torch.randn(5, 70), exclude="*")
    assert found.rewritten == ()
    assert found.summary == "nothing was rewritten: 0 of 4 matmuls, share of the matmul FLOPs: 0.0%"
    assert str(found).endswith(found.summary)


def test_no_matmul_at_all_is_said_aloud() -> None:
    found = report(nn.ReLU(), torch.randn(2))
    assert found.rows == ()
    assert str(found) == found.summary
    assert found.summary.startswith("nothing was rewritten: no matmul was seen")


def test_a_dynamic_m_is_shown_as_a_symbol_and_counted_as_traced() -> None:
    capture = Capture()
    model = nn.Sequential(nn.Linear(70, 30))
    compiled = torch.compile(model, backend=capture, dynamic=True)
    compiled(torch.randn(6, 5, 70))
    (found,) = capture.only.report.rows
    assert found.m not in ("30", "?")
    assert found.m.count("s") == 2  # a product of two symbols
    assert (found.k, found.n, found.flops) == ("70", "30", 2 * 6 * 5 * 70 * 30)
    assert capture.only.report.flops_share == 1
    assert f"{found.m} x 70 x 30" in str(capture.only.report)


def test_an_m_that_depends_on_data_is_not_counted() -> None:
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x[x[:, 0] > 0])

    found = convert(torch.export.export(Chosen(), (torch.randn(4, 8),))).meta["fp8fx_report"]
    (only,) = found.rows
    assert only.m.startswith("u")
    assert only.flops is None
    assert found.flops_share is None


def test_merged() -> None:
    a, b = Report((row(30, True, "a"),)), Report((row(10, False, "b"), row(20, True, "c")))
    merged = Report.merged([a, b])
    assert merged == Report((*a.rows, *b.rows), graphs=2)
    assert merged.flops_share == 50 / 60
    assert Report.merged([merged, a]).graphs == 3
    assert Report.merged(iter([a])) == a
    assert Report.merged([]) == Report((), graphs=0)
    assert "2 of 3 matmuls rewritten" in str(merged)


def test_a_graph_break_gives_one_report_of_two_graphs() -> None:
    w = nn.Parameter(torch.randn(8, 8))

    def function(x: Tensor) -> Tensor:
        y = F.linear(x, w)
        torch._dynamo.graph_break()
        return F.linear(y, w)

    found = fp8fx.explain(function, torch.randn(4, 8))
    assert (found.graphs, len(found.rewritten)) == (2, 2)


def test_the_order_is_the_graph_s() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    found = report(model, exclude=["1", "4"])  # type: ignore[arg-type]
    assert [r.path for r in found.rows] == list("012345")
    assert [r.reason is None for r in found.rows] == [True, False, True, True, False, True]


def test_a_report_is_frozen_and_comparable() -> None:
    found = report(Model(), torch.randn(5, 70))
    assert found == report(Model(), torch.randn(5, 70))
    assert hash(found) == hash(report(Model(), torch.randn(5, 70)))
    with pytest.raises(AttributeError):
        found.graphs = 3  # type: ignore[misc]


def test_it_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fp8fx"):
        found = report(Model())
    assert str(found) in [r.getMessage() for r in caplog.records if r.name == "fp8fx"]
