"""docs/adapters.md: its code runs, and its table is that of the committed result."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch._dynamo.backends.debugging import aot_eager
from transformers import LlamaConfig, LlamaForCausalLM

import fp8fx
from benchmarks import adapters

PAGE = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text()


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, use_cache=False))


@pytest.mark.slow
def test_the_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fp8fx.lowering.compile_fx", lambda gm, inputs, *inner, config_patches: aot_eager(gm, inputs))
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    ids = torch.arange(16).view(2, 8)
    names = {
        "torch": torch,
        "fp8fx": fp8fx,
        "LoraConfig": LoraConfig,
        "get_peft_model": get_peft_model,
        "model": llama(),
        "batches": [{"input_ids": ids, "labels": ids}] * 3,
        "device": "cpu",
        "folder": tmp_path,
    }
    exec(code, names)
    model = names["model"]
    assert isinstance(model, PeftModel)
    base = llama().requires_grad_(False)
    fp8fx.freeze(base, exclude="lm_head")
    before = base(ids).logits
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert not torch.equal(loaded(ids).logits, before)


def test_the_table_is_that_of_the_result() -> None:
    result = json.loads((adapters.RESULTS / "adapters.json").read_text())
    assert f"\n{adapters.table(result['bases'])}\n" in PAGE
    text = " ".join(PAGE.split())
    versions = result["environment"]
    named = [f"{name} {versions[name]}" for name in ("torch", "bitsandbytes", "peft")]
    assert f"one CPU, {', '.join(named)}, {versions['date']}" in text
    assert f"in {result['steps_before']} steps" in text
    assert {len(base["losses"]) for base in result["bases"].values()} == {adapters.STEPS}


@pytest.mark.slow
def test_the_benchmark_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "BATCH", 2)
    results = adapters.run(steps_before=1, steps=2)
    assert list(results) == list(adapters.BASES)
    exact, fp8, int8 = results.values()
    assert fp8["weights_bytes"] == pytest.approx(int8["weights_bytes"], rel=1e-3)
    assert fp8["weights_bytes"] < 0.3 * exact["weights_bytes"]
    for result in (fp8, int8):
        assert result["losses"] == pytest.approx(exact["losses"], rel=0.01)
        assert result["losses"] != exact["losses"]
