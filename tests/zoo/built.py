"""A small model and all that one run of it takes: sizes, inputs, random weights, trained routers, a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, WIDTH, HIDDEN, HEADS, BATCH, LENGTH = 128, 64, 128, 4, 2, 16

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 4 * LENGTH,
}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
CAUSAL = SIZES | TOKENS | {"attention_dropout": 0.0, "use_cache": False}
GROUPED = CAUSAL | {"num_key_value_heads": HEADS // 2}
BERT = SIZES | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
VISION = {"image_size": 32, "patch_size": 8, "num_channels": 3}


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


def itself(output: Tensor) -> Tensor:
    return output


def logits(output: Any) -> Tensor:
    return output.logits


def ids(length: int = LENGTH) -> Tensor:
    return torch.randint(3, VOCABULARY, (BATCH, length))


def pixels() -> Tensor:
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
    """Fits each router of experts to what the first run inside gives it: a token chooses a random expert and its
    neighbour, and clearly so.

    A random router is undecided about so many tokens that which choices a rounding error flips, and so what is
    measured, is luck.
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


def build(
    model: nn.Module, inputs: Mapping[str, Tensor], output: Callable[[Any], Tensor] = logits, **options: Any
) -> Built:
    """With a loss that suits: cross entropy of logits against random classes, the squared distance to random values of
    all else."""
    _randomized(model)
    with torch.no_grad(), _trained_routers(model, inputs):
        shape = output(model.eval()(**inputs)).shape
    classes, values = torch.randint(shape[-1], shape[:-1]), torch.randn(shape)

    def loss(x: Tensor) -> Tensor:
        x = x if x.dtype == torch.float64 else x.float()
        if output is logits:
            return F.cross_entropy(x.flatten(0, -2), classes.flatten().to(x.device))
        return F.mse_loss(x, values.to(x.device, x.dtype))

    return Built(model, inputs, output, loss, **options)
