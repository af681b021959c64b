"""The models that the benchmarks run, with random weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DiTBlock", "GPT2Block", "LlamaBlock", "MoEBlock", "llama_lm", "stack", "to_bitsandbytes"]


class LlamaBlock(nn.Module):
    """Llama-3-8B's block: bias-free linears, grouped-query attention, RMSNorm, SwiGLU; without rotary embeddings."""

    def __init__(self, width: int = 4096, hidden: int = 14336, heads: int = 32, kv_heads: int = 8) -> None:
        super().__init__()
        self.head = width // heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.o = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k, self.v = (nn.Linear(width, kv_heads * self.head, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (-1, self.head)).transpose(1, 2) for f in (self.q, self.k, self.v))
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(attention.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        y: Tensor = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return y


class Conv1D(nn.Module):
    """transformers' GPT-2 linear: addmm over a weight stored (in, out)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class GPT2Block(nn.Module):
    """GPT-2-XL's block."""

    def __init__(self, width: int = 1600, heads: int = 25) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = Conv1D(width, 3 * width), Conv1D(width, width)
        self.up, self.down = Conv1D(width, 4 * width), Conv1D(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, -1))
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attention.transpose(1, 2).flatten(2))
        y: Tensor = x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))
        return y


class DiTBlock(nn.Module):
    """DiT-XL's block: biases, full attention, tanh GELU; a vector, here of the mean token, shifts, scales and gates
    each half."""

    def __init__(self, width: int = 1152, heads: int = 16) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.condition = nn.Linear(width, 6 * width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        nn.init.constant_(
            self.condition.bias, 0.5
        )  # gates as in training's first steps, near 0, would hide what the linears compute

    def forward(self, x: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.condition(F.silu(x.mean(1, keepdim=True))).chunk(6, -1)
        h = self.norm(x) * (1 + scale1) + shift1
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(h).chunk(3, -1))
        x = x + gate1 * self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        h = self.norm(x) * (1 + scale2) + shift2
        y: Tensor = x + gate2 * self.down(F.gelu(self.up(h), approximate="tanh"))
        return y


class MoEBlock(nn.Module):
    """Mixtral's mixture of experts without the attention in front: RMSNorm, a router that chooses the top 2 of 8,
    SwiGLU; of (T, width)."""

    def __init__(self, width: int = 4096, hidden: int = 14336, experts: int = 8, top: int = 2) -> None:
        super().__init__()
        self.experts, self.top = experts, top
        self.norm, self.router = nn.RMSNorm(width), nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.empty(experts, 2 * hidden, width))  # gate and up
        self.down = nn.Parameter(torch.empty(experts, width, hidden))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        weights, chosen = F.softmax(self.router(h), -1, dtype=torch.float32).topk(self.top)
        weights = weights / weights.sum(-1, keepdim=True)
        flat = chosen.flatten()
        order = flat.argsort()  # the places of expert 0 first; a token has as many places as experts
        offs = (flat[:, None] == torch.arange(self.experts, device=x.device)).sum(0).cumsum(0).to(torch.int32)
        gate, up = F.grouped_mm(h[order // self.top], self.up.transpose(-2, -1), offs=offs).chunk(2, -1)
        y = F.grouped_mm(F.silu(gate) * up, self.down.transpose(-2, -1), offs=offs)
        y = y[order.argsort()].unflatten(0, (-1, self.top)) * weights.unsqueeze(-1).to(y.dtype)
        out: Tensor = x + y.sum(1)
        return out

    def exact(self, x: Tensor) -> Tensor:
        """The same in float64, expert by expert, so that only one expert's weights are copied at a time."""
        h = F.rms_norm(x, x.shape[-1:], self.norm.weight.double(), torch.finfo(self.norm.weight.dtype).eps)
        weights, chosen = F.softmax(F.linear(h, self.router.weight.double()), -1).topk(self.top)
        weights, y = weights / weights.sum(-1, keepdim=True), torch.zeros_like(x)
        for expert, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            token, place = (chosen == expert).nonzero(as_tuple=True)
            gate, rise = F.linear(h[token], up.double()).chunk(2, -1)
            y.index_add_(0, token, F.linear(F.silu(gate) * rise, down.double()) * weights[token, place, None])
        return x + y


def stack(block: type[nn.Module], count: int, device: str = "cuda", **sizes: int) -> nn.Sequential:
    """`count` blocks of these sizes in bfloat16; matrices are drawn from N(0, 0.02)."""
    torch.manual_seed(0)
    with torch.device(device):
        model = nn.Sequential(*(block(**sizes) for _ in range(count))).to(torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
    return model


def llama_lm(device: str = "cuda", **sizes: int) -> nn.Module:
    """transformers' Llama, four layers of Llama-3-8B's sizes (1.1 billion parameters) or of these, in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    own = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    config: Any = {**own, "vocab_size": 32000, **sizes}
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = LlamaForCausalLM(LlamaConfig(**config))
    evaluated: nn.Module = model.to(torch.bfloat16).eval()
    return evaluated


def to_bitsandbytes(model: nn.Module) -> None:
    """Puts bitsandbytes' FP8 linear, over the same weights, in the place of every nn.Linear."""
    from bitsandbytes.research.nn import LinearFP8Mixed

    linears = [(name, child) for name, child in model.named_modules() if isinstance(child, nn.Linear)]
    if not linears:
        raise ValueError("the model has no nn.Linear")
    for name, old in linears:
        with torch.device("meta"):
            new = LinearFP8Mixed(old.in_features, old.out_features, old.bias is not None)
        new.weight, new.bias = old.weight, old.bias
        model.set_submodule(name, new)
