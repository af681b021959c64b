"""transformers' generate() over a static cache: what is decoded token by token is what one pass over the whole text
says."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: nothing is downloaded

import pytest
import torch
from torch import Tensor

import fp8fx
from tests.support.capture import Capture

transformers = pytest.importorskip("transformers", reason="the demo extra is not installed")

SIZES = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
NO_STOP = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def error(value: Tensor, reference: Tensor) -> float:
    value, reference = value.double(), reference.double()
    return float((value - reference).norm() / reference.norm())


def generate(device: str, recipe: str) -> tuple[Tensor, Tensor, Tensor]:
    """The new tokens, the logits that they were chosen by, and those of one pass over the whole text."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **HEADS, **NO_STOP, initializer_range=0.1))
    model.eval().requires_grad_(False).to(device)
    plain, config, prompt = (
        model.forward,
        fp8fx.Config(recipe=recipe, profit="always"),
        torch.randint(128, (2, 7)).to(device),
    )
    backend = fp8fx.Backend(config)
    model.forward = torch.compile(plain, backend=backend, fullgraph=True)
    given = {"attention_mask": torch.ones_like(prompt), "cache_implementation": "static", "disable_compile": True}
    found = model.generate(
        prompt, **given, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    assert torch.equal(found.sequences[:, :7], prompt)
    assert [len(report.rewritten) for report in backend.reports] == [8, 8]  # prefill and decode, the head included

    torch._dynamo.reset()
    whole = {"input_ids": found.sequences, "use_cache": False}
    prefilled = torch.compile(plain, backend=Capture(config), fullgraph=True)(**whole).logits[:, 6:-1]
    assert error(prefilled, plain(**whole).logits[:, 6:-1]) > 3e-2  # it is FP8
    return found.sequences[:, 7:], torch.stack(found.logits, 1), prefilled


@pytest.mark.slow
def test_frozen_weights_give_the_same_over_a_cache_that_the_graph_writes() -> None:
    found = []
    for freeze in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            **SIZES, **HEADS, **NO_STOP, initializer_range=0.1, attn_implementation="eager"
        )
        model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
        capture, prompt = Capture(fp8fx.Config(recipe="rowwise", freeze=freeze)), torch.randint(128, (2, 7))
        model.forward = torch.compile(model.forward, backend=capture, fullgraph=True)
        given = {"attention_mask": torch.ones_like(prompt), "cache_implementation": "static", "disable_compile": True}
        made = model.generate(
            prompt, **given, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        found.append((made.sequences, torch.stack(made.logits)))
        for graph in capture.graphs:
            assert {row.reason for row in graph.report.refused} == {"activation times activation"}
            assert [row.remark for row in graph.report.rewritten if "not frozen" in row.remark] == []
    (tokens, logits), (expected, reference) = found
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logits, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.compiles
@pytest.mark.parametrize(
    "recipe", ["mixed", "rowwise"]
)  # of `global`, a token's scale depends on what it is computed together with
def test_a_static_cache_gives_the_tokens_of_a_prefill(recipe: str) -> None:
    tokens, decoded, prefilled = generate("cpu", recipe)
    assert error(decoded, prefilled) < 1e-2  # another order of sums may push a value over to the next FP8 value
    assert torch.equal(prefilled.argmax(-1), tokens)
