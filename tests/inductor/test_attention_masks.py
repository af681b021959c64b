"""The masks that transformers' models make: which are left out, and that attention stays as exact as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from fp8fx import Config
from fp8fx.reasons import MaskReason
from tests.support.capture import Capture
from tests.support.numbers import error

transformers = pytest.importorskip("transformers", reason="the demo extra is not installed")

CAUSAL, NONE, OTHER, INPUT = "is_causal=True", "no mask", MaskReason.OTHER, MaskReason.INPUT
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
SEQUENCE_TO_SEQUENCE = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 64,
    "decoder_start_token_id": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
IDS = torch.arange(14).view(2, 7)
PADDED = torch.ones(2, 7, dtype=torch.long).index_fill(1, torch.tensor([0]), 0)

T5_SIZES = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "vocab_size": 64}
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any], list[Any]]] = {
    "causal": ("Llama", SIZES, {}, [CAUSAL, CAUSAL]),
    "causal, dropout": ("GPTNeoX", {key: SIZES[key] for key in list(SIZES)[:4]} | {"vocab_size": 64}, {}, [CAUSAL] * 2),
    "causal, all ones given": ("Llama", SIZES, {"attention_mask": torch.ones_like(PADDED)}, [INPUT, INPUT]),
    "causal, padding": ("Llama", SIZES, {"attention_mask": PADDED}, [INPUT, INPUT]),
    "causal, packed documents": ("Llama", SIZES, {"position_ids": torch.arange(7).expand(2, 7) % 4}, [INPUT, INPUT]),
    "causal, the user's": ("Llama", SIZES, {"attention_mask": torch.zeros(2, 1, 7, 7)}, [INPUT, INPUT]),
    "a window, shorter": ("Mistral", {**SIZES, "sliding_window": 4}, {}, [OTHER, OTHER]),
    "a window, longer": ("Mistral", {**SIZES, "sliding_window": 8}, {}, [CAUSAL, CAUSAL]),
    "a window in some layers": (
        "Qwen2",
        {**SIZES, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        {},
        [CAUSAL, OTHER],
    ),
    "encoder and decoder": (
        "Whisper",
        {**SEQUENCE_TO_SEQUENCE, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 20},
        {"input_features": torch.linspace(-1, 1, 320).view(2, 8, 20)},
        [CAUSAL],
    ),
    "a bias of positions": ("T5", {**T5_SIZES, "decoder_start_token_id": 0}, {}, None),  # type: ignore[dict-item]
}


def model_of(name: str, sizes: dict[str, Any]) -> Any:
    kind = {"Whisper": "ForConditionalGeneration", "T5": "ForConditionalGeneration"}.get(name, "ForCausalLM")
    config = getattr(transformers, f"{name}Config")(**sizes)
    return getattr(transformers, name + kind)(config).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_as_exact_as_with_the_mask(kind: str) -> None:
    name, sizes, others, expected = KINDS[kind]
    ids = {"decoder_input_ids": IDS} if name in ("Whisper", "T5") else {"input_ids": IDS}
    given = {**ids, "use_cache": False, **({"input_ids": IDS} if name == "T5" else {}), **others}
    torch.manual_seed(0)
    exact = model_of(name, sizes).double()
    model = copy.deepcopy(exact).bfloat16()

    def logits(called: Any, dtype: torch.dtype) -> Tensor:
        floats = {key: x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for key, x in given.items()}
        found: Tensor = called(**floats).logits
        return found

    capture = Capture(Config(profit="never"))
    found = logits(torch.compile(model, backend=capture), torch.bfloat16)
    rows = [row for graph in capture.graphs for row in graph.report.attention]
    if expected is None:  # T5: a bias in its own layers, nothing hidden from the decoder of what is encoded
        assert {row.became or row.kind for row in rows} == {MaskReason.MODELS_TENSOR, NONE}
    else:
        assert [row.became or row.kind for row in rows] == expected
    reference = logits(exact, torch.float64)
    assert error(found, reference) < 1.2 * error(logits(model, torch.bfloat16), reference)
