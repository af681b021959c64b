"""transformers' models, small and with random weights, and what they are called with."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: nothing is downloaded

from typing import Any

import torch
import transformers
from torch import nn

IDS = torch.arange(14).view(2, 7)
PROMPT = {"input_ids": IDS[:1], "attention_mask": torch.ones(1, 7, dtype=torch.long)}
VOCABULARY = 64

_NO_STOP = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **_NO_STOP,
}


def _ready(model: Any) -> Any:
    return model.eval().requires_grad_(False)


def llama(layers: int = 2, tied: bool = False) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(num_hidden_layers=layers, tie_word_embeddings=tied, **_SIZES)
    return _ready(transformers.LlamaForCausalLM(config))


def tied_llama() -> Any:
    """Whose head is its embedding."""
    return llama(tied=True)


def gpt2() -> Any:
    """Of Conv1D, and with a tied head."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_head=2, n_layer=2, n_positions=64, **_NO_STOP)
    return _ready(transformers.GPT2LMHeadModel(config))


def qwen3_moe() -> Any:
    """Of fused experts."""
    torch.manual_seed(0)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 16}
    config = transformers.Qwen3MoeConfig(num_hidden_layers=2, **experts, **_SIZES)
    return _ready(transformers.Qwen3MoeForCausalLM(config))


def mixtral() -> Any:
    """Of fused experts, which its files have under other names."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(num_hidden_layers=2, num_local_experts=4, **_SIZES)
    return _ready(transformers.MixtralForCausalLM(config))


class Own(transformers.PreTrainedModel):
    """A user's model: two linears that share a weight, and a parameter (K, N) that is no module's."""

    config_class = transformers.LlamaConfig
    _tied_weights_keys = {"b.weight": "a.weight"}  # noqa: RUF012

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.a = nn.Linear(32, 32)
        self.b = nn.Linear(32, 32)
        self.w = nn.Parameter(torch.randn(32, 48))
        self.post_init()

    def forward(self, x: Any) -> Any:
        return self.b(self.a(x)) @ self.w


def own() -> Any:
    torch.manual_seed(0)
    return _ready(Own(transformers.LlamaConfig(num_hidden_layers=1, tie_word_embeddings=True, **_SIZES)))


FAMILIES = {build.__name__: build for build in (llama, tied_llama, gpt2, qwen3_moe, mixtral)}
