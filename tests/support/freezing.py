"""What a frozen model has to do on any device: the CPU's tests call it with "cpu", the GPU's with "cuda"."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.fx.experimental._config as shapes
from safetensors.torch import load, save
from torch import Tensor, fx, nn

import fp8fx
from fp8fx.ops.matmul import op

State = dict[str, Tensor]


class Model(nn.Module):
    """Siblings, an addmm over a weight (K, N), a norm, and nothing that needs gradients."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width // 2, bias=False)
        self.weight, self.bias = nn.Parameter(torch.randn(width, width) / 8), nn.Parameter(torch.randn(width))
        self.out = nn.Linear(width, width)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k = self.q(h), self.k(h)
        y = torch.addmm(self.bias, q * torch.cat([k, k], -1), self.weight)
        return self.out(torch.relu(y)) + x


def state_of(model: nn.Module) -> State:
    return {name: x.clone() for name, x in model.state_dict().items()}


def equal(a: State, b: State) -> bool:
    """Bit for bit, NaN included."""

    def bits(x: Tensor) -> Tensor:
        return x.new_empty(x.numel()).copy_(x.flatten()).view(torch.uint8)

    return a.keys() == b.keys() and all(torch.equal(bits(a[k]), bits(b[k])) for k in a)


def error(x: Tensor, reference: Tensor) -> float:
    x, reference = x.detach().double(), reference.detach().double()
    return float((x - reference).norm() / reference.norm())


def frozen(model: nn.Module, recipe: str = "global", **options: Any) -> fx.GraphModule:
    return fp8fx.convert(fx.symbolic_trace(model), recipe=recipe, freeze=True, **options)


def saved(gm: fx.GraphModule) -> fx.GraphModule:
    """The whole module, through a file."""
    file = io.BytesIO()
    torch.save(gm, file)
    file.seek(0)
    found: fx.GraphModule = torch.load(file, weights_only=False)
    return found


def model_on(device: str) -> Model:
    return Model().to(device, torch.float32 if device == "cpu" else torch.bfloat16)


def frozen_on(device: str, recipe: str) -> fx.GraphModule:
    return frozen(model_on(device), recipe, profit="always")


def rows_on(device: str, count: int = 4) -> Tensor:
    return torch.randn(count, 64).to(device, torch.float32 if device == "cpu" else torch.bfloat16)


def check_files(device: str, recipe: str) -> None:
    """A state dict, through torch.save and safetensors."""
    gm, x, file = frozen_on(device, recipe), rows_on(device), io.BytesIO()
    torch.save(gm.state_dict(), file)
    file.seek(0)
    for state in (torch.load(file, weights_only=True), load(save(dict(gm.state_dict())))):
        other = frozen_on(device, recipe)
        assert not torch.equal(other(x), gm(x))
        other.load_state_dict(state)
        assert equal(state_of(other), state_of(gm))
        assert torch.equal(other(x), gm(x))


def check_copies(device: str, recipe: str) -> None:
    """Copies compute the same, and have weights of their own."""
    gm, x, new = frozen_on(device, recipe), rows_on(device), model_on(device).state_dict()
    expected = gm(x)
    for other in (copy.deepcopy(gm), saved(gm)):
        assert torch.equal(other(x), expected)
        other.load_state_dict(new)
        assert not torch.equal(other(x), expected)
        assert torch.equal(gm(x), expected)


def check_loads(device: str, recipe: str) -> None:
    """The state dict of the model as it was, from wherever it is, is quantized as if it had been converted; a bad one
    changes nothing."""
    gm, other, x = frozen_on(device, recipe), model_on(device), rows_on(device)
    expected = frozen(other, recipe, profit="always")
    for state in (other.state_dict(), {name: y.cpu() for name, y in other.state_dict().items()}):
        gm.load_state_dict(model_on(device).state_dict())
        gm.load_state_dict(state)
        assert equal(state_of(gm), state_of(expected))
        assert torch.equal(gm(x), expected(x))
    bad = {**model_on(device).state_dict(), "out.weight": other.out.weight * torch.nan}
    try:
        gm.load_state_dict(bad)
    except fp8fx.errors.FreezeError:
        assert equal(state_of(gm), state_of(expected))
    else:
        raise AssertionError("a bad state dict was taken")


def check_moves(device: str, recipe: str) -> None:
    """From the CPU to the device and back: the same bits, and nearly the same results there."""
    gm, x, dtype = frozen_on("cpu", recipe), rows_on("cpu"), torch.float32
    expected, state = gm(x), state_of(gm)
    gm.to(device)
    assert {y.device.type for y in gm.state_dict().values()} == {device}
    assert error(gm(x.to(device, dtype)).cpu(), expected) < (1e-6 if device == "cpu" else 0.05)
    gm.cpu()
    assert equal(state_of(gm), state)
    assert torch.equal(gm(x), expected)
    gm.half()  # the data stays as it is
    assert error(gm(x.half()), expected) < 0.02
    assert all(torch.equal(y, state[name]) for name, y in gm.state_dict().items() if y.dtype.itemsize == 1)


_ALONE = """
import sys, torch
package, path = sys.argv[1:]
examples = torch.load(path)
run = torch._inductor.aoti_load_package(package)
for x, y in examples:
    print(float((run(x) - y).double().norm() / y.double().norm()))
assert not [name for name in sys.modules if name.startswith("fp8fx")], "fp8fx was imported"
"""


def check_package(folder: Path, device: str, recipe: str, rows: Sequence[int], dynamic: bool) -> None:
    """An AOTInductor package, exported with the first number of rows, runs with all of them in a process that never
    imports fp8fx.

    Where they can be one it is not quantized: the graph says so as it does where that was measured to be faster.
    """
    gm = frozen_on(device, recipe)
    for node in gm.graph.nodes:
        if node.target is op(recipe):
            node.update_kwarg("weight_only", True)
    gm.recompile()
    inputs = [rows_on(device, count) for count in rows]
    with torch.no_grad(), shapes.patch(backed_size_oblivious=1 in rows and dynamic):
        program = torch.export.export(
            gm, (inputs[0],), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},) if dynamic else None
        )
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
        torch.save([(x, gm(x)) for x in inputs], folder / "examples.pt")
    ran = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", _ALONE, package, str(folder / "examples.pt")],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, f"exit status {ran.returncode}\n{ran.stdout}\n{ran.stderr}"
    errors = [float(line) for line in ran.stdout.split()]
    assert len(errors) == len(rows)
    assert max(errors) < (1e-6 if device == "cpu" else 0.05), errors
    if device == "cuda" and 1 in rows:
        with zipfile.ZipFile(package) as files:
            assert any(b"gemv" in files.read(name) for name in files.namelist())
