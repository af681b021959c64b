"""Trains a byte-level GPT-2, its linears written as addmm, on Python's own documentation and sources, through
`backend="fp8"`."""

import argparse
import json
import sysconfig
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange


class Conv1D(nn.Module):
    def __init__(self, inputs: int, outputs: int, std: float = 0.02) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(std * torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class Block(nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = Conv1D(width, 3 * width), Conv1D(width, width, 0.02 / (2 * layers) ** 0.5)
        self.up, self.down = Conv1D(width, 4 * width), Conv1D(4 * width, width, 0.02 / (2 * layers) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, 64)).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self, width: int, layers: int, context: int) -> None:
        super().__init__()
        self.bytes, self.positions = nn.Embedding(256, width), nn.Embedding(context, width)
        nn.init.normal_(self.bytes.weight, std=0.02), nn.init.normal_(self.positions.weight, std=0.02)
        self.norm, self.blocks = nn.LayerNorm(width), nn.Sequential(*(Block(width, layers) for _ in range(layers)))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        h = self.blocks(self.bytes(x) + self.positions.weight[: x.shape[1]])
        return F.cross_entropy(F.linear(self.norm(h), self.bytes.weight).flatten(0, 1).float(), target.flatten())


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--recipe", choices=("mixed", "global", "none"), default="mixed", help="none: plain Inductor, no FP8"
    )
    for name, default in (("steps", 1000), ("width", 768), ("layers", 8), ("context", 512), ("batch", 32), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", type=Path, help="where to write the losses, as JSON")
    args = parser.parse_args(arguments)
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sources = b"".join(file.read_bytes() for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
    data = torch.frombuffer(bytearray("".join(topics.values()).encode() + sources), dtype=torch.uint8)
    model = GPT(args.width, args.layers, args.context).to(device)
    options = (
        {"backend": "inductor"}
        if args.recipe == "none"
        else {"backend": "fp8", "options": {"recipe": args.recipe, "profit": "always"}}
    )
    step, losses, size = torch.compile(model, **options), [], sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-4, args.steps, pct_start=0.1)
    for _ in (progress := trange(args.steps, desc=f"{size / 1e6:.1f}M, {args.recipe}")):
        text = (
            data[torch.randint(len(data) - args.context - 1, (args.batch, 1)) + torch.arange(args.context + 1)]
            .long()
            .to(device)
        )
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = step(text[:, :-1], text[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), schedule.step(), optimizer.zero_grad()
        losses.append(loss.item())
        progress.set_postfix(loss=losses[-1])
    if args.output:
        run = {"device": torch.cuda.get_device_name() if device == "cuda" else "CPU", "date": date.today().isoformat()}
        versions = {"torch": torch.__version__, "triton": version("triton") if find_spec("triton") else None}
        chosen = {name: value for name, value in vars(args).items() if name != "output"}
        args.output.write_text(json.dumps({**run, **versions, "parameters": size, **chosen, "losses": losses}) + "\n")
    return losses


if __name__ == "__main__":
    main()
