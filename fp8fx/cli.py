"""`python -m fp8fx`: what `auto` means on this machine, for bug reports and first looks."""

from __future__ import annotations

import importlib.metadata

import torch
from tabulate import tabulate

import fp8fx
from fp8fx.executors.registry import AUTO, EXECUTORS, resolve
from fp8fx.recipes.recipe import RECIPES

__all__ = ["main"]


def main() -> None:
    """Prints versions, recipes, and the executor of each device."""
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    rows = [
        ("fp8fx", fp8fx.__version__),
        ("torch", torch.__version__),
        *(
            (name, importlib.metadata.version(name))
            for executor in EXECUTORS.values()
            for name in executor.distributions
        ),
        ("recipes", ", ".join(RECIPES)),
    ]
    for device in devices:
        name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
        rows.append((f"executor on {device}{name}", resolve(AUTO, device).name))
    print(tabulate(rows, tablefmt="plain"))
