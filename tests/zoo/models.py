"""Real architectures, built small from their configurations with random weights: no download, no dropout, two layers.

`ZOO` has them by name. Every call of one builds the same: the seed is set first.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: some models look for kernels on the hub

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import nn

from tests.zoo.built import (
    BATCH,
    BERT,
    CAUSAL,
    GROUPED,
    HEADS,
    HIDDEN,
    LENGTH,
    SIZES,
    TOKENS,
    VISION,
    VOCABULARY,
    WIDTH,
    Built,
    build,
    ids,
    itself,
    pixels,
)
from tests.zoo.dit import DiT

__all__ = ["ZOO", "Built"]


def _text(name: str, config: Any, length: int = LENGTH, **options: Any) -> Built:
    """A language model by the name of its class, over random tokens."""
    return build(getattr(transformers, name)(config), {"input_ids": ids(length)}, **options)


def gpt2() -> Built:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=4 * LENGTH,
        n_embd=WIDTH,
        n_layer=2,
        n_head=HEADS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _text("GPT2LMHeadModel", config)


def llama() -> Built:
    return _text("LlamaForCausalLM", transformers.LlamaConfig(**GROUPED))


def mistral() -> Built:
    return _text("MistralForCausalLM", transformers.MistralConfig(**GROUPED, sliding_window=LENGTH // 2))


def qwen2() -> Built:
    return _text("Qwen2ForCausalLM", transformers.Qwen2Config(**GROUPED))


def qwen3() -> Built:
    return _text("Qwen3ForCausalLM", transformers.Qwen3Config(**GROUPED, head_dim=32))


_GEMMA = GROUPED | {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": LENGTH // 2}


def gemma2() -> Built:
    return _text("Gemma2ForCausalLM", transformers.Gemma2Config(**_GEMMA))


def gemma3() -> Built:
    layers = ["sliding_attention", "full_attention"]
    return _text("Gemma3ForCausalLM", transformers.Gemma3TextConfig(**_GEMMA, layer_types=layers))


def phi() -> Built:
    return _text("PhiForCausalLM", transformers.PhiConfig(**CAUSAL, resid_pdrop=0.0, embd_pdrop=0.0, qk_layernorm=True))


def phi3() -> Built:
    return _text("Phi3ForCausalLM", transformers.Phi3Config(**GROUPED, resid_pdrop=0.0, embd_pdrop=0.0))


def opt() -> Built:
    sizes = {name: value for name, value in CAUSAL.items() if name != "intermediate_size"}
    # Three layers: in transformers 5.17 LayerDrop breaks the decoder's graph in training, which leaves the two
    # projections around its layers to eager mode. Of two layers that is 5.6 % of the FLOPs; the OPT that has these
    # projections has 24.
    sizes |= {"pad_token_id": 0, "num_hidden_layers": 3}
    return _text(
        "OPTForCausalLM", transformers.OPTConfig(**sizes, ffn_dim=HIDDEN, word_embed_proj_dim=WIDTH // 2, dropout=0.0)
    )


def falcon() -> Built:
    sizes = {name: value for name, value in CAUSAL.items() if name != "intermediate_size"}
    config = transformers.FalconConfig(
        **sizes, ffn_hidden_size=HIDDEN, new_decoder_architecture=True, num_kv_heads=HEADS // 2, hidden_dropout=0.0
    )
    return _text("FalconForCausalLM", config)


def bloom() -> Built:
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "n_layer": 2,
        "n_head": HEADS,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    return _text("BloomForCausalLM", transformers.BloomConfig(**sizes, **TOKENS, use_cache=False))


# Models of experts are compiled in bfloat16: FP8 takes grouped matmuls in no other dtype, nor does transformers compile
# torch's own.
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def _mixtral(implementation: str, **options: Any) -> Built:
    config = transformers.MixtralConfig(**GROUPED, **_EXPERTS)
    config._experts_implementation = implementation
    return _text("MixtralForCausalLM", config, **options)


def mixtral_eager() -> Built:
    return _mixtral("eager")


def mixtral_batched() -> Built:
    return _mixtral("batched_mm", dtype=torch.bfloat16)


def mixtral_grouped() -> Built:
    return _mixtral("grouped_mm", dtype=torch.bfloat16)


def qwen3_moe() -> Built:
    config = transformers.Qwen3MoeConfig(
        **GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=HIDDEN, head_dim=32
    )
    config._experts_implementation = "grouped_mm"
    return _text("Qwen3MoeForCausalLM", config, dtype=torch.bfloat16)


def gpt_oss() -> Built:
    config = transformers.GptOssConfig(
        **GROUPED, num_local_experts=8, num_experts_per_tok=2, head_dim=32, sliding_window=LENGTH // 2
    )
    config._experts_implementation = "grouped_mm"
    return _text("GptOssForCausalLM", config, dtype=torch.bfloat16)


def deepseek_v3() -> Built:
    config = transformers.DeepseekV3Config(
        **CAUSAL,
        num_key_value_heads=HEADS,
        moe_intermediate_size=HIDDEN,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,  # the first layer dense, the second of experts
        kv_lora_rank=32,
        q_lora_rank=48,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=32,
    )
    config._experts_implementation = "grouped_mm"
    return _text("DeepseekV3ForCausalLM", config, dtype=torch.bfloat16)


_STATE_SPACE = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "state_size": 16,
    "use_cache": False,
} | TOKENS


def mamba() -> Built:
    config = transformers.MambaConfig(**_STATE_SPACE | {"pad_token_id": 0}, time_step_rank=16)
    return _text("MambaForCausalLM", config, length=LENGTH // 4)  # its scan is unrolled, a step a token


def mamba2() -> Built:
    config = transformers.Mamba2Config(
        **_STATE_SPACE | {"pad_token_id": 0}, num_heads=8, head_dim=16, n_groups=1, chunk_size=8
    )
    return _text("Mamba2ForCausalLM", config)


def bert() -> Built:
    return _text("BertForMaskedLM", transformers.BertConfig(**BERT))


def distilbert() -> Built:
    config = transformers.DistilBertConfig(
        vocab_size=VOCABULARY,
        dim=WIDTH,
        hidden_dim=HIDDEN,
        n_layers=2,
        n_heads=HEADS,
        max_position_embeddings=4 * LENGTH,
        dropout=0.0,
        attention_dropout=0.0,
    )
    return _text("DistilBertForMaskedLM", config)


def albert() -> Built:
    return _text(
        "AlbertForMaskedLM", transformers.AlbertConfig(**BERT, embedding_size=WIDTH // 2, classifier_dropout_prob=0.0)
    )


def deberta_v2() -> Built:
    config = transformers.DebertaV2Config(
        **BERT,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=LENGTH // 2,
        position_biased_input=False,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
    )
    return _text("DebertaV2ForMaskedLM", config)


def t5() -> Built:
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=WIDTH // HEADS,
        d_ff=HIDDEN,
        num_layers=2,
        num_heads=HEADS,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        use_cache=False,
        decoder_start_token_id=0,
    )
    built = build(
        transformers.T5ForConditionalGeneration(config), {"input_ids": ids(), "decoder_input_ids": ids(LENGTH // 2)}
    )
    for name, p in built.model.named_parameters():
        if name.endswith("Attention.q.weight"):
            p.data *= config.d_kv**-0.5  # T5 does not scale its scores: its queries' weights start small
    return built


def whisper() -> Built:
    config = transformers.WhisperConfig(
        **TOKENS | {"pad_token_id": 0},
        vocab_size=VOCABULARY,
        num_mel_bins=16,
        d_model=WIDTH,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=HIDDEN,
        decoder_ffn_dim=HIDDEN,
        max_source_positions=LENGTH,
        max_target_positions=LENGTH,
        decoder_start_token_id=1,
        use_cache=False,
    )
    inputs = {"input_features": torch.randn(BATCH, 16, 2 * LENGTH), "decoder_input_ids": ids(LENGTH // 2)}
    return build(transformers.WhisperForConditionalGeneration(config), inputs)


def clip() -> Built:
    sizes = {
        name: SIZES[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    }
    text = sizes | TOKENS | {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, "pad_token_id": 0}
    config = transformers.CLIPConfig(text_config=text, vision_config=sizes | VISION, projection_dim=WIDTH // 2)
    return build(
        transformers.CLIPModel(config),
        {"input_ids": ids(), "pixel_values": pixels()},
        lambda output: torch.cat([output.text_embeds, output.image_embeds]),
    )


def vit() -> Built:
    sizes = {name: value for name, value in BERT.items() if name not in ("vocab_size", "max_position_embeddings")}
    return build(
        transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, **VISION, num_labels=16)),
        {"pixel_values": pixels()},
    )


def convnext() -> Built:
    config = transformers.ConvNextConfig(
        num_channels=3,
        image_size=32,
        patch_size=4,
        num_stages=2,
        hidden_sizes=[WIDTH, HIDDEN],
        depths=[1, 1],
        num_labels=16,
    )
    return build(transformers.ConvNextForImageClassification(config), {"pixel_values": pixels()})


def swinv2() -> Built:
    config = transformers.Swinv2Config(
        image_size=32,
        patch_size=4,
        embed_dim=WIDTH,
        depths=[2, 2],
        num_heads=[2, HEADS],
        window_size=4,
        mlp_ratio=2.0,
        drop_path_rate=0.0,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=16,
    )
    return build(transformers.Swinv2ForImageClassification(config), {"pixel_values": pixels()})


def wav2vec2() -> Built:
    sizes = {name: value for name, value in SIZES.items() if name != "max_position_embeddings"}
    off = (
        "hidden_dropout",
        "activation_dropout",
        "attention_dropout",
        "feat_proj_dropout",
        "final_dropout",
        "layerdrop",
    )
    config = transformers.Wav2Vec2Config(
        **sizes,
        **dict.fromkeys(off, 0.0),
        conv_dim=[32, 32],
        conv_stride=[5, 4],
        conv_kernel=[10, 8],
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        apply_spec_augment=False,
    )
    return build(transformers.Wav2Vec2ForCTC(config), {"input_values": torch.randn(BATCH, 400)})


def dit() -> Built:
    return build(DiT(), {"pixels": pixels(), "time": torch.rand(BATCH), "label": torch.arange(BATCH)}, itself)


def _transformer_encoder(training: bool) -> Built:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    return build(model, {"src": torch.randn(BATCH, LENGTH, WIDTH)}, itself, training=training)


def transformer_encoder_train() -> Built:
    return _transformer_encoder(training=True)


def transformer_encoder_eval() -> Built:
    return _transformer_encoder(training=False)


def multihead_attention() -> Built:
    """With keys and values of other widths than the queries."""
    model = nn.MultiheadAttention(WIDTH, HEADS, kdim=48, vdim=80, batch_first=True)
    inputs = {name: torch.randn(BATCH, LENGTH, width) for name, width in (("query", WIDTH), ("key", 48), ("value", 80))}
    return build(model, inputs, lambda output: output[0])


_BUILDERS: Mapping[str, Callable[[], Built]] = {
    "GPT-2": gpt2,
    "Llama": llama,
    "Mistral": mistral,
    "Qwen2": qwen2,
    "Qwen3": qwen3,
    "Gemma2": gemma2,
    "Gemma3": gemma3,
    "Phi": phi,
    "Phi3": phi3,
    "OPT": opt,
    "Falcon": falcon,
    "Bloom": bloom,
    "Mixtral-eager": mixtral_eager,
    "Mixtral-batched": mixtral_batched,
    "Mixtral-grouped": mixtral_grouped,
    "Qwen3-MoE": qwen3_moe,
    "gpt-oss": gpt_oss,
    "DeepSeek-V3": deepseek_v3,
    "Mamba": mamba,
    "Mamba2": mamba2,
    "BERT": bert,
    "DistilBERT": distilbert,
    "ALBERT": albert,
    "DeBERTa-v2": deberta_v2,
    "T5": t5,
    "Whisper": whisper,
    "CLIP": clip,
    "ViT": vit,
    "ConvNeXt": convnext,
    "Swinv2": swinv2,
    "Wav2Vec2": wav2vec2,
    "DiT": dit,
    "TransformerEncoder-train": transformer_encoder_train,
    "TransformerEncoder-eval": transformer_encoder_eval,
    "MultiheadAttention": multihead_attention,
}


def _seeded(build: Callable[[], Built]) -> Callable[[], Built]:
    def seeded() -> Built:
        torch.manual_seed(0)
        return build()

    return seeded


ZOO: Mapping[str, Callable[[], Built]] = {name: _seeded(build) for name, build in _BUILDERS.items()}
