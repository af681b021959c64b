"""The experts' benchmark without a GPU: the mixture at toy size, what each contender computes, the command."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fp8fx
from benchmarks import experts, harness
from benchmarks.experts import CASES, CONTENDERS, Grouped, Mixture, table
from benchmarks.models import MoEBlock
from fp8fx.recipes.quantize import sqnr
from tests.support.agreement import Lowered

TOY = {"width": 64, "hidden": 96, "experts": 4}


@torch.no_grad()
def test_the_mixture_at_toy_size() -> None:
    case = Mixture(tokens=40, compared=32)
    model, x = case.build("cpu", **TOY)
    y, expected = model(x), case.reference(model, x)
    assert y.shape == x.shape and y.dtype == torch.bfloat16
    assert expected.shape == (32, 64) and expected.dtype == torch.float64
    assert sqnr(expected, y[:32]) > 40
    assert (expected - x[:32]).norm() > 0.001 * expected.norm()  # the experts do something
    chosen = model[0].router(model[0].norm(x)).topk(2).indices
    assert len(chosen.unique()) > 1


@torch.no_grad()
def test_its_experts_are_frozen() -> None:
    model, x = Mixture(tokens=40).build("cpu", **TOY)
    backend = Lowered(fp8fx.Config(freeze=True))
    y = torch.compile(model, backend=backend)(x)
    assert [row.op for row in backend.reports[0].rewritten] == ["grouped_mm_fp8_mixed"] * 4
    assert [row.reason is not None and row.reason.startswith("a router") for row in backend.reports[0].refused] == [
        True,
        True,
    ]
    assert 40 < sqnr(model(x), y) < 90


def test_the_mixture_is_mixtrals() -> None:
    with torch.device("meta"):
        block = MoEBlock()
    assert (block.up.shape, block.down.shape, block.top) == ((8, 28672, 4096), (8, 4096, 14336), 2)
    assert {case.tokens for case in CASES.values() if isinstance(case, Mixture)} == {8192, 64}


@torch.no_grad()
def test_what_each_contender_of_a_grouped_matmul_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda call: call)
    case = Grouped(3, 64, 48, 37)
    x, w, offs = case.operands("cpu")
    assert offs.tolist() == sorted(offs.tolist()) and offs[-1] == 37
    assert (x.shape, w.shape, offs.dtype) == ((37, 64), (3, 48, 64), torch.int32)
    found = {name: case.call(name, "cpu")() for name in ("bf16", "mixed", "mixed frozen")}
    assert sqnr(found["bf16"], found["mixed"]) > 25
    assert torch.equal(found["mixed"], found["mixed frozen"])
    gemm = case.call("GEMM", "cpu")
    assert gemm.func.__func__ is experts.ScaledMM.grouped_matmul  # type: ignore[attr-defined]
    assert all(q.data.dtype == torch.float8_e4m3fn for q in gemm.args[:2])  # type: ignore[attr-defined]


def test_what_the_mixture_is_compiled_with(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda model, **arguments: given.append(arguments))
    for contender in Mixture.contenders:
        Mixture(64).compiled(torch.nn.Linear(2, 2), contender)
    assert given == [{}, {"backend": "fp8", "options": {"freeze": True}}]


def test_tables() -> None:
    head, _, *lines = table(
        {"bf16": {"ms": 2.0}, "GEMM": {"ms": 1.6}, "mixed": {"error": "ValueError: no"}}
    ).splitlines()
    assert head.split() == ["ms", "against", "bf16"]
    assert [line.split() for line in lines] == [
        ["bf16", "2.000", "1.000x"],
        ["GEMM", "1.600", "1.250x"],
        ["mixed", "ValueError:", "no"],
    ]
    whole: dict[str, Any] = {"ms": 2.0, "peak_gib": 3.0, "weights_gib": 1.5, "host_us": 45.2, "relative_error": 0.0123}
    whole["kernel_ms"] = {"GEMM": 1.25}
    (line,) = table({"mixed frozen": whole}).splitlines()[2:]
    assert line.split() == ["mixed", "frozen", "2.000", "45", "3.00", "1.50", "1.2e-02", "1.250", "0.000", "0.000"]


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[tuple[str, str]] = []

    def contend(
        module: str, runs: list[tuple[str, str]], together: int, patience: float
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        assert (module, together, patience) == ("benchmarks.experts", 2, 90)
        asked.extend(runs)
        yield "mixtral-64", {name: {"ms": 1.0, "compile_s": 5.0, "kernel_ms": {}} for _, name in runs}

    monkeypatch.setattr(harness, "contend", contend)
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(harness, "environment", lambda: {"device": "toy"})
    monkeypatch.setattr(sys, "argv", ["experts", "--cases", "mixtral-64", "--together", "2", "--patience", "90"])
    experts.main()
    assert asked == [("mixtral-64", "bf16"), ("mixtral-64", "mixed frozen")]
    assert "1.000x" in capsys.readouterr().out
    saved = json.loads((tmp_path / "experts_mixtral-64.json").read_text())
    assert saved["environment"] == {"device": "toy"}
    assert saved["contenders"]["bf16"] == {"ms": 1.0, "kernel_ms": {}}


def test_who_takes_part() -> None:
    assert all(set(case.contenders) <= set(CONTENDERS) for case in CASES.values())
    assert all(case.k % 16 == case.n % 16 == 0 for case in CASES.values() if isinstance(case, Grouped))
