"""Real architectures, built small from their configurations with random weights: no download, no dropout, two layers.

`ZOO` has them by name. Every call of one builds the same: the seed is set first.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: some models look for kernels on the hub

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

__all__ = ["ZOO", "Built"]

VOCABULARY, WIDTH, HIDDEN, HEADS, BATCH, LENGTH = 128, 64, 128, 4, 2, 16

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 4 * LENGTH,
}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
_CAUSAL = _SIZES | _TOKENS | {"attention_dropout": 0.0, "use_cache": False}
_GROUPED = _CAUSAL | {"num_key_value_heads": HEADS // 2}
_BERT = _SIZES | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_VISION = {"image_size": 32, "patch_size": 8, "num_channels": 3}


@dataclass(frozen=True)
class Built:
    """A model and all that one run of it takes.

    Attributes:
        model: with float32 weights.
        inputs: what it is called with, by name.
        output: picks the tensor to judge from what it returns.
        loss: a scalar of that tensor.
        dtype: what it is compiled in.
        training: whether the inference, too, is made in train mode.
    """

    model: nn.Module
    inputs: Mapping[str, Tensor]
    output: Callable[[Any], Tensor]
    loss: Callable[[Tensor], Tensor]
    dtype: torch.dtype = torch.float32
    training: bool = False


def _itself(output: Tensor) -> Tensor:
    return output


def _logits(output: Any) -> Tensor:
    return output.logits


def _ids(length: int = LENGTH) -> Tensor:
    return torch.randint(3, VOCABULARY, (BATCH, length))


def _pixels() -> Tensor:
    return torch.randn(BATCH, 3, 32, 32)


@torch.no_grad()
def _randomized(model: nn.Module) -> None:
    """Weights that keep an activation's size, and biases and norms that are not the constants they start as."""
    for p in model.parameters():
        if p.dim() > 1:
            p.normal_(std=p[0].numel() ** -0.5 if p.dim() == 4 else p.shape[-1] ** -0.5)
        else:
            p.add_(0.1 * torch.randn_like(p))


@contextmanager
def _trained_routers(model: nn.Module, inputs: Mapping[str, Tensor]) -> Iterator[None]:
    """Fits each router of experts to what the first run inside gives it: a token chooses a random expert and its neighbour, and clearly so.

    A random router is undecided about so many tokens that which choices a rounding error flips, and so what is measured, is luck.
    """

    def fit(router: nn.Module, args: tuple[Tensor, ...]) -> None:
        x, count = args[0].flatten(0, -2), len(router.weight)
        first = torch.randint(count, (VOCABULARY,))[inputs["input_ids"].flatten()]
        wanted = torch.full((len(x), count), -2.0).scatter_(
            1, torch.stack([first, first ^ 1], 1), torch.tensor([2.0, 1.0]).expand(len(x), 2)
        )
        router.weight.copy_(wanted.T @ torch.linalg.solve(x @ x.T + torch.eye(len(x)), x))

    routers = [module for name, module in model.named_modules() if name.endswith((".gate", ".router"))]
    hooks = [router.register_forward_pre_hook(fit) for router in routers]
    yield
    for hook in hooks:
        hook.remove()


def _built(model: nn.Module, inputs: Mapping[str, Tensor], output: Callable[[Any], Tensor] = _logits, **options: Any) -> Built:
    """With a loss that suits: cross entropy of logits against random classes, the squared distance to random values of all else."""
    _randomized(model)
    with torch.no_grad(), _trained_routers(model, inputs):
        shape = output(model.eval()(**inputs)).shape
    classes, values = torch.randint(shape[-1], shape[:-1]), torch.randn(shape)

    def loss(x: Tensor) -> Tensor:
        x = x if x.dtype == torch.float64 else x.float()
        if output is _logits:
            return F.cross_entropy(x.flatten(0, -2), classes.flatten().to(x.device))
        return F.mse_loss(x, values.to(x.device, x.dtype))

    return Built(model, inputs, output, loss, **options)


def _text(name: str, config: Any, length: int = LENGTH, **options: Any) -> Built:
    """A language model by the name of its class, over random tokens."""
    return _built(getattr(transformers, name)(config), {"input_ids": _ids(length)}, **options)


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
    return _text("LlamaForCausalLM", transformers.LlamaConfig(**_GROUPED))


def mistral() -> Built:
    return _text("MistralForCausalLM", transformers.MistralConfig(**_GROUPED, sliding_window=LENGTH // 2))


def qwen2() -> Built:
    return _text("Qwen2ForCausalLM", transformers.Qwen2Config(**_GROUPED))


def qwen3() -> Built:
    return _text("Qwen3ForCausalLM", transformers.Qwen3Config(**_GROUPED, head_dim=32))


_GEMMA = _GROUPED | {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": LENGTH // 2}


def gemma2() -> Built:
    return _text("Gemma2ForCausalLM", transformers.Gemma2Config(**_GEMMA))


def gemma3() -> Built:
    layers = ["sliding_attention", "full_attention"]
    return _text("Gemma3ForCausalLM", transformers.Gemma3TextConfig(**_GEMMA, layer_types=layers))


def phi() -> Built:
    return _text("PhiForCausalLM", transformers.PhiConfig(**_CAUSAL, resid_pdrop=0.0, embd_pdrop=0.0, qk_layernorm=True))


def phi3() -> Built:
    return _text("Phi3ForCausalLM", transformers.Phi3Config(**_GROUPED, resid_pdrop=0.0, embd_pdrop=0.0))


def opt() -> Built:
    sizes = {name: value for name, value in _CAUSAL.items() if name != "intermediate_size"}
    # Three layers: in transformers 5.17 LayerDrop breaks the decoder's graph in training, which leaves the two projections around its
    # layers to eager mode. Of two layers that is 5.6 % of the FLOPs; the OPT that has these projections has 24.
    sizes |= {"pad_token_id": 0, "num_hidden_layers": 3}
    return _text("OPTForCausalLM", transformers.OPTConfig(**sizes, ffn_dim=HIDDEN, word_embed_proj_dim=WIDTH // 2, dropout=0.0))


def falcon() -> Built:
    sizes = {name: value for name, value in _CAUSAL.items() if name != "intermediate_size"}
    config = transformers.FalconConfig(
        **sizes, ffn_hidden_size=HIDDEN, new_decoder_architecture=True, num_kv_heads=HEADS // 2, hidden_dropout=0.0
    )
    return _text("FalconForCausalLM", config)


def bloom() -> Built:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "n_layer": 2, "n_head": HEADS, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    return _text("BloomForCausalLM", transformers.BloomConfig(**sizes, **_TOKENS, use_cache=False))


# Models of experts are compiled in bfloat16: FP8 takes grouped matmuls in no other dtype, nor does transformers compile torch's own.
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def _mixtral(implementation: str, **options: Any) -> Built:
    config = transformers.MixtralConfig(**_GROUPED, **_EXPERTS)
    config._experts_implementation = implementation
    return _text("MixtralForCausalLM", config, **options)


def mixtral_eager() -> Built:
    return _mixtral("eager")


def mixtral_batched() -> Built:
    return _mixtral("batched_mm", dtype=torch.bfloat16)


def mixtral_grouped() -> Built:
    return _mixtral("grouped_mm", dtype=torch.bfloat16)


def qwen3_moe() -> Built:
    config = transformers.Qwen3MoeConfig(**_GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=HIDDEN, head_dim=32)
    config._experts_implementation = "grouped_mm"
    return _text("Qwen3MoeForCausalLM", config, dtype=torch.bfloat16)


def gpt_oss() -> Built:
    config = transformers.GptOssConfig(**_GROUPED, num_local_experts=8, num_experts_per_tok=2, head_dim=32, sliding_window=LENGTH // 2)
    config._experts_implementation = "grouped_mm"
    return _text("GptOssForCausalLM", config, dtype=torch.bfloat16)


def deepseek_v3() -> Built:
    config = transformers.DeepseekV3Config(
        **_CAUSAL,
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


_STATE_SPACE = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "state_size": 16, "use_cache": False} | _TOKENS


def mamba() -> Built:
    config = transformers.MambaConfig(**_STATE_SPACE | {"pad_token_id": 0}, time_step_rank=16)
    return _text("MambaForCausalLM", config, length=LENGTH // 4)  # its scan is unrolled, a step a token


def mamba2() -> Built:
    config = transformers.Mamba2Config(**_STATE_SPACE | {"pad_token_id": 0}, num_heads=8, head_dim=16, n_groups=1, chunk_size=8)
    return _text("Mamba2ForCausalLM", config)


def bert() -> Built:
    return _text("BertForMaskedLM", transformers.BertConfig(**_BERT))


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
    return _text("AlbertForMaskedLM", transformers.AlbertConfig(**_BERT, embedding_size=WIDTH // 2, classifier_dropout_prob=0.0))


def deberta_v2() -> Built:
    config = transformers.DebertaV2Config(
        **_BERT,
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
    built = _built(transformers.T5ForConditionalGeneration(config), {"input_ids": _ids(), "decoder_input_ids": _ids(LENGTH // 2)})
    for name, p in built.model.named_parameters():
        if name.endswith("Attention.q.weight"):
            p.data *= config.d_kv**-0.5  # T5 does not scale its scores: its queries' weights start small
    return built


def whisper() -> Built:
    config = transformers.WhisperConfig(
        **_TOKENS | {"pad_token_id": 0},
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
    inputs = {"input_features": torch.randn(BATCH, 16, 2 * LENGTH), "decoder_input_ids": _ids(LENGTH // 2)}
    return _built(transformers.WhisperForConditionalGeneration(config), inputs)


def clip() -> Built:
    sizes = {name: _SIZES[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    text = sizes | _TOKENS | {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, "pad_token_id": 0}
    config = transformers.CLIPConfig(text_config=text, vision_config=sizes | _VISION, projection_dim=WIDTH // 2)
    return _built(
        transformers.CLIPModel(config),
        {"input_ids": _ids(), "pixel_values": _pixels()},
        lambda output: torch.cat([output.text_embeds, output.image_embeds]),
    )


def vit() -> Built:
    sizes = {name: value for name, value in _BERT.items() if name not in ("vocab_size", "max_position_embeddings")}
    return _built(
        transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, **_VISION, num_labels=16)), {"pixel_values": _pixels()}
    )


def convnext() -> Built:
    config = transformers.ConvNextConfig(
        num_channels=3, image_size=32, patch_size=4, num_stages=2, hidden_sizes=[WIDTH, HIDDEN], depths=[1, 1], num_labels=16
    )
    return _built(transformers.ConvNextForImageClassification(config), {"pixel_values": _pixels()})


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
    return _built(transformers.Swinv2ForImageClassification(config), {"pixel_values": _pixels()})


def wav2vec2() -> Built:
    sizes = {name: value for name, value in _SIZES.items() if name != "max_position_embeddings"}
    off = ("hidden_dropout", "activation_dropout", "attention_dropout", "feat_proj_dropout", "final_dropout", "layerdrop")
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
    return _built(transformers.Wav2Vec2ForCTC(config), {"input_values": torch.randn(BATCH, 400)})


class _DiTBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(F.silu(condition)).unsqueeze(1).chunk(6, -1)
        h = F.layer_norm(x, (WIDTH,)) * (1 + scale) + shift
        q, k, v = self.qkv(h).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + gate * self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        h = F.layer_norm(x, (WIDTH,)) * (1 + scale2) + shift2
        return x + gate2 * self.down(F.gelu(self.up(h), approximate="tanh"))


class _DiT(nn.Module):
    """A diffusion transformer: noisy patches, a time and a class in; the noise of each patch out."""

    def __init__(self, patch: int = 4) -> None:
        super().__init__()
        self.patch = patch
        self.embed = nn.Conv2d(3, WIDTH, patch, patch)
        self.position = nn.Parameter(torch.zeros(1, (32 // patch) ** 2, WIDTH))
        self.label = nn.Embedding(10, WIDTH)
        self.time = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.blocks = nn.ModuleList(_DiTBlock() for _ in range(2))
        self.modulation, self.out = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, patch * patch * 3)

    def forward(self, pixels: Tensor, time: Tensor, label: Tensor) -> Tensor:
        angles = time[:, None] * torch.exp(-torch.arange(WIDTH // 2, device=time.device) / 8).to(time.dtype)
        condition = self.time(torch.cat([angles.cos(), angles.sin()], -1)) + self.label(label)
        x = self.embed(pixels).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.modulation(F.silu(condition)).unsqueeze(1).chunk(2, -1)
        return self.out(F.layer_norm(x, (WIDTH,)) * (1 + scale) + shift)


def dit() -> Built:
    return _built(_DiT(), {"pixels": _pixels(), "time": torch.rand(BATCH), "label": torch.arange(BATCH)}, _itself)


def _transformer_encoder(training: bool) -> Built:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    return _built(model, {"src": torch.randn(BATCH, LENGTH, WIDTH)}, _itself, training=training)


def transformer_encoder_train() -> Built:
    return _transformer_encoder(training=True)


def transformer_encoder_eval() -> Built:
    return _transformer_encoder(training=False)


def multihead_attention() -> Built:
    """With keys and values of other widths than the queries."""
    model = nn.MultiheadAttention(WIDTH, HEADS, kdim=48, vdim=80, batch_first=True)
    inputs = {name: torch.randn(BATCH, LENGTH, width) for name, width in (("query", WIDTH), ("key", 48), ("value", 80))}
    return _built(model, inputs, lambda output: output[0])


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
