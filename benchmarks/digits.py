"""Loss parity on a CPU: an MLP learns scikit-learn's digits in float32 and by both recipes.

    python -m benchmarks.digits        # some minutes; writes results/digits.json, which benchmarks.loss_parity plots

tests/training/test_training.py runs the same, and holds the recipes' accuracies to float32's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import date
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import Tensor, nn

import fp8fx
from benchmarks.harness import RESULTS

RUNS, SEEDS, STEPS = ("float32", "mixed", "global"), range(3), 300


def learn(model: nn.Module, call: Callable[[Tensor], Tensor], seed: int) -> tuple[list[float], float]:
    """The loss of every step, and the accuracy in percent of the half of the digits that was held out.

    Args:
        model: the linears, which are initialized anew.
        call: the model as it is, or compiled.
        seed: of the weights and the batches.
    """
    images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    images = images.float() / 16
    train, test = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).split([901, 896])
    torch.manual_seed(seed)
    model.apply(lambda layer: layer.reset_parameters() if isinstance(layer, nn.Linear) else None)
    batches, losses = torch.randint(len(train), (STEPS, 128)), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    for batch in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(call(images[train[batch]]), labels[train[batch]])
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    right = [call(images[part]).argmax(1) == labels[part] for part in test.split(128)]
    return losses, float(torch.cat(right).double().mean() * 100)


def runs() -> Iterator[tuple[str, list[tuple[list[float], float]]]]:
    """What each of RUNS learns, by seed."""
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    for name in RUNS:
        backend = fp8fx.Backend(fp8fx.Config(recipe="mixed" if name == "float32" else name))
        call: Callable[[Tensor], Tensor] = model if name == "float32" else torch.compile(model, backend=backend)
        yield name, [learn(model, call, seed) for seed in SEEDS]
        assert [len(report.rewritten) for report in backend.reports] == ([] if name == "float32" else [2])


def main() -> None:
    """Writes results/digits.json."""
    results: dict[str, Any] = {"device": "CPU", "torch": torch.__version__, "date": date.today().isoformat()}
    for name, found in runs():
        results[name] = [
            {"seed": seed, "accuracy": right, "losses": losses}
            for seed, (losses, right) in zip(SEEDS, found, strict=True)
        ]
        print(name, *(f"{right:.2f}" for _, right in found), flush=True)
    (RESULTS / "digits.json").write_text(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
