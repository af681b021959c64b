"""LoRA on a frozen base: the loss and the memory of FP8, of bitsandbytes' 8 bits, and of the base as it was.

    python -m benchmarks.adapters      # a minute or two on a CPU; writes results/adapters.json

A byte-level GPT is trained on one half of Python's documentation topics. Then rank-8 adapters of its linears learn the
other half, from the same start and on the same batches, on each of BASES.
"""

from __future__ import annotations

import copy
import importlib.metadata
import itertools
import json
from collections.abc import Callable
from datetime import date
from pydoc_data.topics import topics
from typing import Any

import bitsandbytes
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tabulate import tabulate
from torch import Tensor, nn

import fp8fx
from benchmarks.harness import RESULTS

WIDTH, HEADS, LAYERS, CONTEXT, BATCH = 128, 4, 2, 128, 16
STEPS_BEFORE, STEPS, WINDOW = 400, 200, 20
LINEARS = ["qkv", "out", "up", "down"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.positions = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        """The loss of predicting each byte of `text` (B, CONTEXT + 1)."""
        x = self.bytes(text[:, :-1]) + self.positions.weight
        return F.cross_entropy(self.head(self.norm(self.blocks(x))).flatten(0, 1), text[:, 1:].flatten())


def unquantized(model: GPT) -> None:
    """Leaves the base as it is."""


def frozen(model: GPT) -> None:
    """Quantizes the weights of the blocks' linears to FP8."""
    fp8fx.freeze(model, exclude="head")


def eight_bit(model: GPT) -> None:
    """Has bitsandbytes quantize the weights of the blocks' linears to int8."""
    for block, name in itertools.product(model.blocks, LINEARS):
        layer = getattr(block, name)
        new = bitsandbytes.nn.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False)
        new.load_state_dict(layer.state_dict())
        setattr(block, name, new.to("cpu").requires_grad_(False))


BASES: dict[str, Callable[[GPT], None]] = {
    "float32": unquantized,
    "FP8 (fp8fx.freeze)": frozen,
    "int8 (bitsandbytes)": eight_bit,
}


def weights_bytes(model: GPT) -> int:
    """The bytes of the blocks' linears: weights, scales and biases."""
    state = model.blocks.state_dict()
    parts = {f".{name}." for name in LINEARS}
    held = [x for name, x in state.items() if isinstance(x, Tensor) and any(part in name for part in parts)]
    return sum(x.numel() * x.element_size() for x in held)


def text() -> tuple[Tensor, Tensor]:
    """The two halves of the topics, as bytes."""
    data = torch.frombuffer(bytearray("".join(topics.values()).encode()), dtype=torch.uint8).long()
    first, second = data.chunk(2)
    return first, second


def train(model: nn.Module, data: Tensor, steps: int, rate: float, seed: int) -> list[float]:
    """The loss of every step."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(data) - CONTEXT - 1, (BATCH, 1), generator=generator)
        loss = model(data[starts + torch.arange(CONTEXT + 1)])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def run(steps_before: int = STEPS_BEFORE, steps: int = STEPS) -> dict[str, dict[str, Any]]:
    """The losses of adapters on each base, and the bytes of its linears."""
    torch.manual_seed(0)
    model = GPT()
    first, second = text()
    train(model, first, steps_before, 1e-3, seed=0)
    model.requires_grad_(False)
    results = {}
    for name, quantize in BASES.items():
        base = copy.deepcopy(model)
        quantize(base)
        size = weights_bytes(base)
        torch.manual_seed(1)
        adapted: Any = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=LINEARS))
        results[name] = {"weights_bytes": size, "losses": train(adapted, second, steps, 2e-3, seed=1)}
    return results


def table(results: dict[str, dict[str, Any]]) -> str:
    """Loss and memory by base, as the page has them."""
    rows = []
    for name, result in results.items():
        losses = result["losses"]
        first = sum(losses[:WINDOW]) / len(losses[:WINDOW])
        last = sum(losses[-WINDOW:]) / len(losses[-WINDOW:])
        rows.append((name, f"{first:.4f}", f"{last:.4f}", f"{result['weights_bytes'] / 1024:.0f}"))
    headers = ("base", f"loss, first {WINDOW} steps", f"loss, last {WINDOW} steps", "KiB of its linears")
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def main() -> None:
    """Writes results/adapters.json and prints the table."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "bitsandbytes", "peft")}
    environment = {"device": "CPU", **versions, "date": date.today().isoformat()}
    results = run()
    print(environment)
    print(table(results))
    written = {"environment": environment, "steps_before": STEPS_BEFORE, "bases": results}
    (RESULTS / "adapters.json").write_text(json.dumps(written) + "\n")


if __name__ == "__main__":
    main()
