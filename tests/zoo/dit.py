"""A diffusion transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.built import HEADS, HIDDEN, WIDTH


class Block(nn.Module):
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


class DiT(nn.Module):
    """A diffusion transformer: noisy patches, a time and a class in; the noise of each patch out."""

    def __init__(self, patch: int = 4) -> None:
        super().__init__()
        self.patch = patch
        self.embed = nn.Conv2d(3, WIDTH, patch, patch)
        self.position = nn.Parameter(torch.zeros(1, (32 // patch) ** 2, WIDTH))
        self.label = nn.Embedding(10, WIDTH)
        self.time = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.modulation, self.out = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, patch * patch * 3)

    def forward(self, pixels: Tensor, time: Tensor, label: Tensor) -> Tensor:
        angles = time[:, None] * torch.exp(-torch.arange(WIDTH // 2, device=time.device) / 8).to(time.dtype)
        condition = self.time(torch.cat([angles.cos(), angles.sin()], -1)) + self.label(label)
        x = self.embed(pixels).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.modulation(F.silu(condition)).unsqueeze(1).chunk(2, -1)
        return self.out(F.layer_norm(x, (WIDTH,)) * (1 + scale) + shift)
