"""What the cache of compiled code on disk knows, asked by processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

PROCESS = """
import json, sys
import torch
from torch._dynamo.utils import counters
from torch._inductor import cpu_vec_isa
import fp8fx

cpu_vec_isa.valid_vec_isa_list = list  # what vectors this CPU has takes longer to find out than all else
device, seed, *configurations = json.loads(sys.argv[1])
torch.set_num_threads(1)
torch.manual_seed(seed)
model, x, grad = (made.to(device) for made in (torch.nn.Linear(64, 48), torch.randn(16, 64), torch.randn(16, 48)))


def results(call, training):
    out = call(x.requires_grad_(training))
    return [out, *torch.autograd.grad(out, (x, *model.parameters()), grad)] if training else [out]


for training, options in configurations:
    torch._dynamo.reset()
    counters.clear()
    model.requires_grad_(training)
    found, expected = (results(call, training) for call in (
        torch.compile(model, backend="fp8", options=options), fp8fx.convert(model, **options)))
    for value, reference in zip(found, expected, strict=True):
        assert (value - reference).norm() < (1e-5 if device == "cpu" else 1e-2) * reference.norm()
    print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
"""

HIT_OR_MISS = {
    "1 0": "hit",
    "0 1": "miss",
    "2 0": "both hit",
    "0 2": "both miss",
}  # of a graph, or of forward and backward


def caching(folder: Path, device: str, seed: int, *configurations: tuple[bool, dict[str, Any]]) -> list[str]:
    """Compiles a linear, to train or not, by each configuration in a process of its own: hit or miss of Inductor's
    cache in `folder`."""
    result = subprocess.run(
        [sys.executable, "-c", PROCESS, json.dumps([device, seed, *configurations])],
        env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return [HIT_OR_MISS[line] for line in result.stdout.splitlines()]


def assert_the_cache_knows_a_configuration_from_another(folder: Path, device: str) -> None:
    always = {"profit": "always"}
    mixed, frozen, other = always | {"recipe": "mixed"}, always | {"freeze": True}, always | {"recipe": "global"}
    first = [(False, mixed), (False, frozen), (True, mixed)]
    assert caching(folder, device, 0, *first) == ["miss", "miss", "both miss"]
    # Other weights, which a frozen graph holds, too; then another graph, and the same one of another configuration.
    others = [(False, other), (False, mixed | {"min_features": 1}), (True, other)]
    assert caching(folder, device, 1, *first, *others) == ["hit", "hit", "both hit", "miss", "miss", "both miss"]
