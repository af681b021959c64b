"""The benchmark of whole models without a GPU: what each contender loads and computes at toy size, and the table."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: nothing is downloaded

from typing import Any

import pytest
import torch
from torch import Tensor

import fp8fx
from benchmarks import whole
from benchmarks.whole import CASES, HEADS, OURS, load, table
from tests.support.numbers import error

pytest.importorskip("transformers", reason="the demo extra is not installed")
pytest.importorskip("diffusers", reason="the test extra is not installed")

pytestmark = pytest.mark.slow

LLAMA = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 64}
FLUX = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
TOY: dict[str, dict[str, Any]] = {
    "llama-prefill": {**LLAMA, "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen3-moe-prefill": {**LLAMA, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, **EXPERTS},
    "bert-large": {**LLAMA, "num_attention_heads": 4},
    "flux": {**FLUX, "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8)},
}


@pytest.mark.parametrize("contender", OURS)
@pytest.mark.parametrize("name", TOY)
def test_each_contender_has_the_same_weights_and_ours_are_fp8(name: str, contender: str) -> None:
    exact, frozen = (load(CASES[name], kind, "cpu", **TOY[name]) for kind in ("bf16", contender))
    weights = dict(frozen.named_parameters())
    for key, value in exact.named_parameters():
        if isinstance(weights[key], fp8fx.FP8Weight):
            assert error(weights[key].dequantize(), value) < 0.05, key
        else:
            assert torch.equal(weights[key], value), key
    linears = {f"{path}.weight" for path, child in exact.named_modules() if isinstance(child, torch.nn.Linear)}
    left_out = {key for key in linears if key.startswith(HEADS[0].rstrip("*"))}
    experts = {key for key in weights if key.endswith(("experts.gate_up_proj", "experts.down_proj"))}
    assert {key for key, x in weights.items() if isinstance(x, fp8fx.FP8Weight)} == linears - left_out | experts


def test_a_call_is_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    logits: list[Tensor] = []
    for contender in ("bf16", "rowwise"):
        case, model = CASES["llama-prefill"], load(CASES["llama-prefill"], contender, "cpu", **TOY["llama-prefill"])
        torch.manual_seed(0)
        with torch.no_grad():
            logits.append(case.prepare(model, {})(**whole._tokens(model, "cpu", 16)))
    assert 1e-3 < error(logits[1], logits[0]) < 0.3


@pytest.mark.parametrize("name", ["llama-prefill", "bert-large", "qwen3-moe-prefill", "llama-decode"])
def test_a_call_by_each_case(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    model = load(CASES[name], "rowwise", "cpu", **TOY.get(name, TOY["llama-prefill"]))
    given = {"input_ids": torch.randint(3, 64, (1, 1 if name == "llama-decode" else 8))}
    with torch.no_grad():
        y = CASES[name].prepare(model, {})(**given)
    assert y.shape[:1] == (1,) and y.isfinite().all()


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.trains])
def test_a_step_of_training_learns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda model, **backend: compiled.append(backend) or model)
    model = load(CASES[name], "global", "cpu", **TOY["llama-prefill"], head_dim=16)
    step = CASES[name].prepare(model, whole.backend_of("global", trains=True))
    given = whole._tokens(model, "cpu", 16, batch=2)
    losses = [float(step(**given)) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert compiled == [{"backend": "fp8", "options": {"recipe": "global"}}]
    assert model.is_gradient_checkpointing == ("checkpointed" in name)


def test_what_each_contender_gives_the_compiler() -> None:
    assert whole.backend_of("bf16", False) == whole.backend_of(whole.TORCHAO, True) == {}
    assert whole.backend_of("rowwise", False) == {"backend": "fp8"}
    assert whole.backend_of(whole.CAUSAL, True) == {"backend": "fp8", "options": {"profit": "never"}}
    assert whole._in_cuda_graphs({}) == {"mode": "reduce-overhead"}
    both = {"profit": "never", "mode": "reduce-overhead"}
    assert whole._in_cuda_graphs(whole.backend_of(whole.CAUSAL, False)) == {"backend": "fp8", "options": both}


def test_the_memory_of_weights_counts_data_and_scales_once() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False)).bfloat16().requires_grad_(False)
    assert sum(x.untyped_storage().nbytes() for x in whole._memory(model)) == 64 * 32 * 2
    fp8fx.freeze(model)
    model.tied = model[0]
    assert sum(x.untyped_storage().nbytes() for x in whole._memory(model)) == 64 * 32 + 32 * 4


def test_the_table_has_ratios_and_errors() -> None:
    row = {"ms": 2.0, "load_s": 1.0, "compile_s": 3.0, "kernel_ms": {"GEMM": 1.5}}
    text = table({"bf16": row, "rowwise": {**row, "ms": 1.0}, "mixed": {"error": "out of memory"}})
    assert "2.000x" in text
    assert "out of memory" in text
