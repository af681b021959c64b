"""The inference benchmarks' parts that need no GPU: the models at toy sizes, what each contender is compiled with, host
cost, tables."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import fp8fx
from benchmarks import gemm
from benchmarks.inference import BITSANDBYTES, CASES, CONTENDERS, Blocks, Generate, host_microseconds, prepare, table
from benchmarks.models import DiTBlock, GPT2Block, LlamaBlock, to_bitsandbytes

TOY: dict[type[nn.Module], dict[str, int]] = {
    LlamaBlock: {"width": 64, "hidden": 96, "heads": 4, "kv_heads": 2},
    GPT2Block: {"width": 64, "heads": 4},
    DiTBlock: {"width": 64, "heads": 4},
}
TOY_LM = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
BLOCKS = {name: case for name, case in CASES.items() if isinstance(case, Blocks)}


@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_blocks_at_toy_sizes(name: str) -> None:
    case = BLOCKS[name]
    _, tokens, width = case.shape
    assert (
        case.compared >= tokens or case.block is not DiTBlock
    )  # where a token sees later ones, all have to be in the reference
    assert width == {LlamaBlock: 4096, GPT2Block: 1600, DiTBlock: 1152}[case.block]
    case = replace(case, shape=(2, min(tokens, 6), 64), compared=6 if case.block is DiTBlock else 4)
    model, x = case.build("cpu", **TOY[case.block])
    y, expected = case.run(model, x), case.reference(model, x)
    assert y.shape == x.shape and y.dtype == x.dtype == torch.bfloat16
    assert expected.shape == case.part(y).shape and expected.dtype == torch.float64
    assert len(case.part(y)) == (2 if tokens == 1 else 1)
    assert (case.part(y) - expected).norm() < 0.02 * expected.norm()
    assert (case.part(y) - case.part(x)).norm() > 0.01 * expected.norm()  # the blocks do something


@pytest.mark.slow
def test_generate_at_toy_sizes() -> None:
    pytest.importorskip("transformers")
    case = Generate(prompt=5, steps=3)
    model, x = case.build("cpu", **TOY_LM, vocab_size=50)
    assert case.run(model, x).shape == (1, 8)
    reports = [fp8fx.explain(model, seen) for seen in case.inputs(x)]
    assert [len(report.rewritten) for report in reports] == [8, 8]
    assert [{row.m for row in report.rewritten} for report in reports] == [{"5"}, {"1"}]


def test_who_takes_part() -> None:
    assert not set().union(*(case.left_out for case in CASES.values())) - set(CONTENDERS)
    assert all((BITSANDBYTES in case.left_out) == case.graph for case in BLOCKS.values())


def test_what_each_contender_is_compiled_with(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []

    def compiler(call: Callable[..., Any], **arguments: Any) -> Callable[..., Any]:
        given.append(arguments)
        return call

    monkeypatch.setattr(torch, "compile", compiler)
    for contender in ("bf16", "global"):
        for graph in (False, True):
            model = nn.Sequential(nn.Linear(2, 2)).requires_grad_(False)
            prepare(model, contender, graph)
            assert isinstance(model[0].weight, fp8fx.FP8Weight) == (contender == "global")
    assert given == [
        {},
        {"mode": "reduce-overhead"},
        {"backend": "fp8"},
        {"backend": "fp8", "mode": "reduce-overhead"},
    ]
    prepare(nn.Linear(2, 2), "bf16", dynamic=False)
    assert given[-1] == {"dynamic": False}
    with pytest.raises(ValueError, match="unknown contender 'globl'"):
        prepare(nn.Linear(2, 2), "globl")


@pytest.mark.parametrize(
    ("contender", "config"), [("torchao weight-only", "Float8WeightOnlyConfig"), ("torchao PerRow", "dynamic")]
)
@pytest.mark.parametrize("tuned", [False, True])
def test_torchao_sets_inductors_options_where_the_case_is_tuned(
    monkeypatch: pytest.MonkeyPatch, contender: str, config: str, tuned: bool
) -> None:
    given: list[Any] = []
    names = {"Float8WeightOnlyConfig": "Float8WeightOnlyConfig", "Float8DynamicActivationFloat8WeightConfig": "dynamic"}
    members: dict[str, Any] = {name: functools.partial(dict, kind=kind) for name, kind in names.items()}
    quantization = types.SimpleNamespace(**members, PerRow=str, quantize_=lambda model, config: given.append(config))
    monkeypatch.setitem(sys.modules, "torchao", types.SimpleNamespace(quantization=quantization))
    monkeypatch.setattr(torch, "compile", lambda call: call)
    prepare(nn.Linear(2, 2), contender, tuned=tuned)
    granularity = {} if contender == "torchao weight-only" else {"granularity": ""}
    assert given == [{"kind": config, **granularity, "set_inductor_config": tuned}]


def test_bitsandbytes_takes_every_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    class LinearFP8Mixed(nn.Linear):
        pass

    monkeypatch.setitem(sys.modules, "bitsandbytes.research.nn", type("module", (), {"LinearFP8Mixed": LinearFP8Mixed}))
    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 2, bias=False)))
    before = model.state_dict()
    to_bitsandbytes(model)
    assert [type(module) for module in model.modules()] == [
        nn.Sequential,
        LinearFP8Mixed,
        nn.Sequential,
        LinearFP8Mixed,
    ]
    assert {name: x.data_ptr() for name, x in model.state_dict().items()} == {
        name: x.data_ptr() for name, x in before.items()
    }
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        to_bitsandbytes(nn.Sequential(nn.ReLU()))


def test_host_cost_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("wait"))
    assert host_microseconds(lambda: events.append("call"), calls=5, queue=2) > 0
    assert events == ["wait", "call", "call", "wait", "call", "call", "wait", "call"]


def test_table() -> None:
    row: dict[str, Any] = {
        "ms": 2.0,
        "peak_gib": 3.0,
        "weights_gib": 1.5,
        "kernel_ms": {"GEMM": 1.25},
        "kernel_count": 12.0,
    }
    ours = row | {"ms": 1.6, "released_gib": 0.8, "host_us": 45.2, "compile_s": 9.87, "relative_error": 0.0123}
    head, _, first, failed, last = table(
        {"bf16": row, "broken": {"error": "ValueError: " + "x" * 99}, "mixed": ours}
    ).splitlines()
    titles = (
        "ms against bf16 host us peak GiB weights GiB compile s error GEMM ms quantize ms attention ms other ms kernels"
    )
    assert " ".join(head.split()) == titles
    assert first.split() == ["bf16", "2.000", "1.000x", "3.00", "1.50", "1.250", "0.000", "0.000", "0.000", "12"]
    assert failed.split() == ["broken", "ValueError:", "x" * 68]
    figures = ["45", "3.00", "1.50", "(0.80)", "9.9", "1.2e-02", "1.250", "0.000", "0.000", "0.000", "12"]
    assert last.split() == ["mixed", "1.600", "1.250x", *figures]
    assert "1.250x" not in table({"mixed": ours})


def test_gemm_linears_exceed_the_cache() -> None:
    with torch.device("meta"):
        copies = {case: len(gemm.Linears(*map(int, case.split("x"))).linears) for case in gemm.CASES}
        assert all(2 <= count <= 24 for count in copies.values())
        assert all(2 * k * n * copies[f"{k}x{n}"] >= 160_000_000 for k, n in gemm.SHAPES)
        model = gemm.Linears(4, 8, least=160)
        assert [tuple(y.shape) for y in model(*(torch.empty(3, 4, dtype=torch.bfloat16) for _ in model.linears))] == [
            (3, 8)
        ] * 3


def test_gemm_table() -> None:
    rows: dict[str, dict[str, Any]] = {
        "bf16": {"us": {"1": 8.0, "2": 9.0}, "relative_error": {"1": 0.002, "64": 0.003}, "fp8": []},
        "torchao PerRow": {"us": {"1": 16.0, "2": 3.0}, "relative_error": {"1": 0.05}, "fp8": []},
        "mixed": {"us": {"1": 4.0, "2": 10.0}, "relative_error": {"1": 0.04}, "fp8": ["1"]},
        "global": {"error": "ValueError: no"},
    }
    head, _, *lines = gemm.table(rows).splitlines()
    assert " ".join(head.split()) == "M bf16 us torchao PerRow us mixed us bf16 / torchao PerRow bf16 / mixed"
    assert [line.split() for line in lines] == [
        ["1", "8.00", "16.00", "4.00", "0.500x", "2.000x"],
        ["2", "9.00", "3.00", "10.00", "3.000x", "0.900x", "="],
        ["smallest", "0.500x", "0.900x"],
        ["in", "FP8", "0.500x", "2.000x"],
        ["error,", "M", "=", "1", "2.00e-03", "5.00e-02", "4.00e-02"],
        ["error,", "M", "=", "64", "3.00e-03", "nan", "nan"],
        ["error,", "M", "=", "16384", "nan", "nan", "nan"],
        ["global:", "ValueError:", "no"],
    ]


@torch.no_grad()
def test_gemm_errors_are_of_the_first_rows() -> None:
    model, x = gemm.Linears(4, 8, least=160), torch.randn(600, 4, dtype=torch.bfloat16)
    inputs = [x for _ in model.linears]
    expected = gemm.exact(model, inputs)
    assert expected.dtype == torch.float64 and expected.shape == (512, 8)
    first = model(*inputs)[0]
    for rows in (1, 64, 600):
        assert 0 < gemm.relative_error(first[:rows], expected) < 0.01
    assert gemm.relative_error(first * 2, expected) > 0.9
