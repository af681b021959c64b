"""The training step's benchmark without a GPU: a step of each contender at toy size, what it is compiled with, figures,
table, command."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.func import functional_call

from benchmarks import harness, train_step
from benchmarks.models import GPT2Block, LlamaBlock
from benchmarks.train_step import CASES, CONTENDERS, compiled, one, stepper, table

TOY: dict[type[nn.Module], dict[str, int]] = {
    LlamaBlock: {"width": 64, "hidden": 96, "heads": 4, "kv_heads": 2},
    GPT2Block: {"width": 64, "heads": 4},
}


def toy(name: str, contender: str) -> Callable[[], list[Tensor]]:
    """The step of two small blocks on a CPU."""
    case = replace(CASES[name], count=2, batch=2, length=16, width=64)
    return stepper(case, contender, "cpu", **TOY[case.block])  # type: ignore[return-value]  # every parameter has a gradient


def in_float32(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The model over its parameters cast to float32, which their gradients are rounded back from."""
    return lambda x: functional_call(
        model, {name: p.float() for name, p in model.named_parameters()}, x.float()
    ).bfloat16()


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest of any gradient."""
    pairs = zip(found, expected, strict=True)
    return max(float((x.double() - y.double()).norm() / y.double().norm()) for x, y in pairs)


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """AOTAutograd's graphs run eagerly: no C++ compiler."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr("fp8fx.lowering.compile_fx", lambda gm, inputs, *inner, config_patches: aot_eager(gm, inputs))


@pytest.mark.slow
@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_a_step_of_each_contender_at_toy_size(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as exact:
        exact.setattr(torch, "compile", in_float32)
        expected = toy(case, "bf16")()
    errors = {}
    for contender in ("bf16", "mixed", "global"):
        step = toy(case, contender)
        found = step()
        assert [(grad.shape, grad.dtype) for grad in found] == [(grad.shape, grad.dtype) for grad in expected]
        assert all(torch.equal(*pair) for pair in zip(found, step(), strict=True))  # nothing adds up from step to step
        errors[contender] = error(found, expected)
    assert 0 < errors["bf16"] < 0.03
    assert all(2 * errors["bf16"] < errors[recipe] < 0.2 for recipe in ("mixed", "global"))  # FP8's noise, and no more


def test_what_each_contender_is_compiled_with(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda model, **arguments: given.append(arguments))
    for contender in ("bf16", "mixed", "global"):
        compiled(nn.Linear(2, 2), contender)
    assert given == [
        {},
        {"backend": "fp8", "options": {"recipe": "mixed"}},
        {"backend": "fp8", "options": {"recipe": "global"}},
    ]
    assert {"bf16", "mixed", "global"} == {name for name in CONTENDERS if not name.startswith("torchao ")}


def test_the_cases_are_as_wide_as_their_blocks() -> None:
    with torch.device("meta"):
        for case in CASES.values():
            x = torch.empty(case.batch, case.length, case.width, dtype=torch.bfloat16)
            assert case.block().bfloat16()(x).shape == x.shape
    assert {name: case.batch * case.length for name, case in CASES.items()} == {
        "llama": 8192,
        "llama-small-m": 1024,
        "gpt2": 8192,
    }


@pytest.mark.slow
@pytest.mark.usefixtures("without_inductor")
def test_the_figures_of_one_contender(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the device's clock and memory, which are made up."""
    events: list[str] = []
    monkeypatch.setattr(train_step, "stepper", lambda case, contender: toy("gpt2", contender))
    monkeypatch.setattr(train_step, "await_turn", lambda: events.append("turn"))
    monkeypatch.setattr(train_step, "milliseconds", lambda step: 1.5 if len(step()) == 1 + 2 * 12 else 0.0)
    monkeypatch.setattr(train_step, "kernel_times", lambda step: ({"GEMM": 1.25}, [("gemm", 0.01, 1.0)] * 50))
    for name, value in {
        "synchronize": None,
        "reset_peak_memory_stats": None,
        "max_memory_allocated": 3 * 2**30,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda name=name, value=value: events.append(name) or value)
    row = one("gpt2", "mixed")
    assert row.pop("compile_s") > 0
    assert row == {"ms": 1.5, "peak_gib": 3.0, "kernel_ms": {"GEMM": 1.25}, "kernels": [("gemm", 0.01, 1.0)] * 40}
    assert events == ["synchronize", "turn", "reset_peak_memory_stats", "max_memory_allocated"]


def test_the_table() -> None:
    row: dict[str, Any] = {"ms": 2.0, "peak_gib": 3.0, "kernel_ms": {"GEMM": 1.25, "quantize": 0.5}}
    ours = row | {"ms": 1.6, "compile_s": 9.87}
    head, _, *lines = table(
        {"bf16": row, "torchao rowwise": {"error": "ValueError: " + "x" * 99}, "mixed": ours}
    ).splitlines()
    assert " ".join(head.split()) == "ms against bf16 peak GiB compile s GEMM ms quantize ms attention ms other ms"
    assert [line.split() for line in lines] == [
        ["bf16", "2.00", "1.000x", "3.00", "1.2", "0.5", "0.0", "0.0"],
        ["torchao", "rowwise", "ValueError:", "x" * 68],
        ["mixed", "1.60", "1.250x", "3.00", "9.9", "1.2", "0.5", "0.0", "0.0"],
    ]
    assert "1.250x" not in table({"mixed": ours})


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[tuple[str, str]] = []

    def contend(
        module: str, runs: list[tuple[str, str]], together: int, patience: float
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        assert (module, together, patience) == ("benchmarks.train_step", 6, 90)
        asked.extend(runs)
        yield "gpt2", {name: {"ms": 1.0, "peak_gib": 2.0, "compile_s": 5.0, "kernel_ms": {}} for _, name in runs}

    monkeypatch.setattr(harness, "contend", contend)
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(harness, "environment", lambda: {"device": "toy"})
    monkeypatch.setattr(
        sys,
        "argv",
        ["train_step", "--cases", "gpt2", "--contenders", "bf16", "global", "--together", "6", "--patience", "90"],
    )
    train_step.main()
    assert asked == [("gpt2", "bf16"), ("gpt2", "global")]
    assert "1.000x" in capsys.readouterr().out
    saved = json.loads((tmp_path / "train_step_gpt2.json").read_text())
    row = {"ms": 1.0, "peak_gib": 2.0, "kernel_ms": {}}  # no compile time of contenders that compile together
    assert saved == {"environment": {"device": "toy"}, "case": "gpt2", "contenders": {"bf16": row, "global": row}}
