"""Models whose weights are FP8, compiled: what a graph reads of them, what it shares, and what it sees of changes."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config

import fp8fx
from fp8fx import FP8Weight
from fp8fx.ops.matmul import op
from fp8fx.recipes.recipe import RECIPES
from tests.support.capture import Capture, ops
from tests.support.numbers import error

recipes = pytest.mark.parametrize("recipe", sorted(RECIPES))
eagerly = pytest.mark.usefixtures("uncompiled")


class Block(nn.Module):
    """Siblings with biases and without, a parameter that is read as it is, and a residual."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, 32, bias=False), nn.Linear(width, 32)
        self.out = nn.Linear(width, width)
        self.raw = nn.Parameter(torch.randn(width, width) / 8)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        a = self.q(h) * torch.cat([self.k(h), self.v(h)], -1).sigmoid()
        return x + self.out(a * 2) + torch.relu(a) @ self.raw.T


def frozen_block(recipe: str, seed: int = 0) -> Block:
    torch.manual_seed(seed)
    block = Block()
    fp8fx.freeze(block, recipe, inputs=(torch.randn(2, 64),))
    assert sum(isinstance(x, FP8Weight) for x in block.parameters()) == 5
    return block


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 64, generator=torch.Generator().manual_seed(1))


class Inputs:
    """What each graph is compiled with, instead of being compiled."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.graphs: list[tuple[fx.GraphModule, Sequence[Any]]] = []
        self.calls: list[tuple[Any, ...]] = []
        monkeypatch.setattr("fp8fx.lowering.compile_fx", self._compile)

    def _compile(self, gm: fx.GraphModule, inputs: Sequence[Any], *inner: Any, config_patches: Any) -> Any:
        self.graphs.append((gm, inputs))

        def call(*args: Any) -> Any:
            self.calls.append(args)
            return gm.forward(*args)

        return call


@pytest.fixture
def inputs(monkeypatch: pytest.MonkeyPatch) -> Inputs:
    return Inputs(monkeypatch)


# What a graph reads.


@recipes
def test_a_graph_reads_plain_tensors(recipe: str, inputs: Inputs, x: Tensor) -> None:
    block = frozen_block(recipe)
    expected = block(x)
    assert error(torch.compile(block, backend="fp8")(x), expected) < 1e-6
    ((gm, given),) = inputs.graphs
    assert all(type(y) in (Tensor, nn.Parameter) for y in given)
    assert len(gm.graph.find_nodes(op="placeholder")) == len(given)
    # q, k and v as one, out and raw; and under a scale per tensor those of q, k and v each.
    assert sum(y.dtype == torch.float8_e4m3fn for y in given) == 3
    assert ops(gm.graph)[op(recipe)] == 3
    assert not any(node.op == "call_module" for node in gm.graph.nodes)


@recipes
def test_siblings_lie_side_by_side_and_no_call_copies_them(recipe: str, inputs: Inputs, x: Tensor) -> None:
    block = frozen_block(recipe)
    before = [w.dequantize() for w in (block.q.weight, block.k.weight, block.v.weight)]
    call = torch.compile(block, backend="fp8")
    for _ in range(3):
        call(x)
    q, k, v = (layer.weight.qdata for layer in (block.q, block.k, block.v))
    assert [y.data_ptr() - q.data_ptr() for y in (q, k, v)] == [0, 64 * 64, 96 * 64]
    for weight, exact in zip((block.q.weight, block.k.weight, block.v.weight), before, strict=True):
        assert torch.equal(weight.dequantize(), exact)
    addresses = [[y.data_ptr() for y in args if isinstance(y, Tensor) and y is not x] for args in inputs.calls]
    assert addresses[0] == addresses[1] == addresses[2]
    assert q.data_ptr() in addresses[0]
    assert ops(inputs.graphs[0][0].graph)[torch.ops.aten.cat.default] == (recipe == "global")  # of the scales


def _by_save_file(block: Block, other: Block, path: Path) -> None:
    safetensors.torch.save_file(block.state_dict(), path)
    other.load_state_dict(safetensors.torch.load_file(path))


def _by_save_model(block: Block, other: Block, path: Path) -> None:
    safetensors.torch.save_model(block, str(path))
    safetensors.torch.load_model(other, str(path))


def _by_torch_save(block: Block, other: Block, path: Path) -> None:
    torch.save(block.state_dict(), path)
    assert path.stat().st_size < 2 * sum(x.numel() for x in block.parameters())
    other.load_state_dict(torch.load(path, weights_only=True))


@recipes
@pytest.mark.parametrize("way", [_by_save_file, _by_save_model, _by_torch_save])
def test_siblings_that_lie_side_by_side_are_saved_apart(
    way: Callable[[Any, Any, Path], None], recipe: str, inputs: Inputs, x: Tensor, tmp_path: Path
) -> None:
    block, other = frozen_block(recipe), frozen_block(recipe, seed=1)
    for model in (block, other):
        torch.compile(model, backend="fp8")(x)
    way(block, other, tmp_path / "block")
    assert torch.equal(other(x), block(x))


@recipes
def test_what_was_moved_is_laid_side_by_side_anew(recipe: str, inputs: Inputs, x: Tensor) -> None:
    block = frozen_block(recipe)
    call = torch.compile(block, backend="fp8")
    call(x)
    other = copy.deepcopy(block)
    state = frozen_block(recipe, seed=1).state_dict()
    assert error(torch.compile(other, backend="fp8")(x), block(x)) < 1e-6
    q, k = other.q.weight.qdata, other.k.weight.qdata
    assert k.data_ptr() - q.data_ptr() == 64 * 64
    assert q.data_ptr() != block.q.weight.qdata.data_ptr()
    other.load_state_dict(state, assign=True)
    assert error(torch.compile(other, backend="fp8")(x), other(x)) < 1e-6
    assert len(inputs.graphs) == 1


def test_a_graph_that_would_lay_them_otherwise_leaves_them(inputs: Inputs, x: Tensor) -> None:
    block = frozen_block("rowwise")
    torch.compile(block, backend="fp8")(x)

    def two(block: Block, x: Tensor) -> tuple[Tensor, Tensor]:
        return block.k(x) * 2, block.v(x) * 2

    backend = fp8fx.Backend()
    expected = two(block, x)
    for y, value in zip(torch.compile(two, backend=backend)(block, x), expected, strict=True):
        assert error(y, value) < 1e-6
    assert {row.remark for row in backend.reports[0].rows} == {
        "not merged with its siblings: another graph has frozen them apart"
    }


def test_the_biases_of_siblings_are_put_side_by_side_once(inputs: Inputs, x: Tensor) -> None:
    block = frozen_block("rowwise")
    call = torch.compile(block, backend="fp8")
    call(x)
    assert ops(inputs.graphs[0][0].graph)[torch.ops.aten.cat.default] == 0
    block.q.bias.add_(1)
    assert error(call(x), block(x)) < 1e-6


@recipes
def test_a_weight_without_fp8_op_is_dequantized(recipe: str, x: Tensor) -> None:
    block = frozen_block(recipe)
    exact = copy.deepcopy(block)
    for name in ("q", "k", "v", "out"):
        getattr(exact, name).weight = nn.Parameter(getattr(block, name).weight.dequantize(), requires_grad=False)
    exact.raw = nn.Parameter(block.raw.dequantize(), requires_grad=False)
    capture = Capture(fp8fx.Config(exclude="*"))
    assert error(torch.compile(block, backend=capture)(x), exact(x)) < 1e-6
    assert ops(capture.only.after.graph)[op(recipe)] == 0


def test_a_part_of_a_weight(x: Tensor) -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = FP8Weight(torch.randn(96, 64))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return F.linear(x, self.w[32:]) * 2, x.relu() @ self.w.view(2, 48, 64)[1].T, self.w.sum(0)

    model = Parts()
    capture = Capture()
    for y, expected in zip(torch.compile(model, backend=capture)(x), model(x), strict=True):
        assert error(y, expected) < 1e-6
    assert [row.n for row in capture.only.report.rewritten] == ["64", "48"]


def test_the_executor_that_keeps_no_fp8_weights_is_refused(x: Tensor) -> None:
    with pytest.raises(BackendCompilerFailed, match=r"q\.weight is an FP8 weight, and executor 'bitsandbytes' keeps"):
        torch.compile(frozen_block("mixed"), backend="fp8", options={"executor": "bitsandbytes"})(x)


def test_the_report_has_the_weights_own_recipe(x: Tensor) -> None:
    report = fp8fx.explain(frozen_block("global"), x)
    assert {row.op for row in report.rows} == {"matmul_fp8_global"}


# What graphs share.


@eagerly
@recipes
def test_equal_blocks_share_a_graph(recipe: str, x: Tensor) -> None:
    blocks = [frozen_block(recipe, seed) for seed in range(12)]
    counters.clear()
    for block in blocks:
        expected = block(x)
        block.compile(backend="fp8")
        assert error(block(x), expected) < 1e-6
    assert counters["stats"]["unique_graphs"] == 1


# What it sees of changes.


def _copy(block: Block, new: Block) -> None:
    block.q.weight.copy_(new.q.weight.dequantize())


def _exchange(block: Block, new: Block) -> None:
    block.q.weight = new.q.weight


def _load(block: Block, new: Block) -> None:
    block.load_state_dict(new.state_dict())


def _load_high_precision(block: Block, new: Block) -> None:
    torch.manual_seed(3)
    block.load_state_dict(Block().state_dict())


def _data(block: Block, new: Block) -> None:
    block.q.weight.data += 1


def _set_data(block: Block, new: Block) -> None:
    block.raw.data = torch.randn(64, 64)


def _earlier_alias(block: Block, new: Block) -> None:
    block.alias.copy_(torch.randn(64, 64))


@eagerly
@recipes
@pytest.mark.parametrize(
    "change",
    [_copy, _exchange, _load, _load_high_precision, _data, _set_data, _earlier_alias],
    ids=lambda f: f.__name__,
)
def test_a_change_is_seen_without_compiling(change: Callable[[Any, Any], None], recipe: str, x: Tensor) -> None:
    block, new = frozen_block(recipe), frozen_block(recipe, seed=1)
    block.__dict__["alias"] = block.q.weight.detach()
    backend = fp8fx.Backend()
    call = torch.compile(block, backend=backend)
    before = call(x)
    with torch.no_grad():
        change(block, new)
    assert error(call(x), block(x)) < 1e-6
    assert error(call(x), before) > 1e-2
    assert len(backend.reports) == 1


@eagerly
@recipes
def test_a_compiled_model_is_cast_and_moved(recipe: str, x: Tensor) -> None:
    block = frozen_block(recipe)
    call = torch.compile(block, backend="fp8")
    y = call(x)
    block.bfloat16()
    assert error(call(x.bfloat16()), y) < 0.05
    block.to("meta")
    assert call(x.bfloat16().to("meta")).is_meta


# Through compilers.


@pytest.mark.compiles
@recipes
@pytest.mark.parametrize("backend", ["inductor", "fp8"])
def test_compiled_is_eager(backend: str, recipe: str, x: Tensor) -> None:
    block = frozen_block(recipe)
    assert error(torch.compile(block, backend=backend)(x), block(x)) < 1e-6


@pytest.mark.compiles
@pytest.mark.parametrize("backend", ["inductor", "fp8"])
def test_dynamic_shapes(backend: str) -> None:
    block = frozen_block("rowwise")
    call = torch.compile(block, backend=backend, dynamic=True)
    for rows in (4, 7, 1, 33):
        x = torch.randn(rows, 64)
        assert error(call(x), block(x)) < 1e-6


@pytest.mark.compiles
@recipes
@pytest.mark.parametrize("backend", ["inductor", "fp8"])
def test_the_gradient_of_the_input(backend: str, recipe: str, x: Tensor) -> None:
    model = nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 64)).requires_grad_(False)
    fp8fx.freeze(model, recipe)
    grads = []
    for call in (model, torch.compile(model, backend=backend)):
        leaf = x.clone().requires_grad_()
        call(leaf).square().sum().backward()
        grads.append(leaf.grad)
    assert error(grads[1], grads[0]) < 1e-5


@pytest.mark.compiles
def test_inputs_that_are_weights_are_static(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph copies every input that is not."""
    seen: list[tuple[int, list[int]]] = []
    from fp8fx import lowering

    compile_graph = lowering.compile_fx_inner

    def spy(gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
        seen.append((len(example_inputs), list(kwargs["static_input_idxs"])))
        return compile_graph(gm, example_inputs, **kwargs)

    monkeypatch.setattr(lowering, "compile_fx_inner", spy)
    block = frozen_block("rowwise")
    with inductor_config.patch(force_disable_caches=True):
        torch.compile(block, backend="fp8")(x)
    ((count, static),) = seen
    assert len(static) == count - 1  # all but x


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool, x: Tensor) -> None:
    block = frozen_block("rowwise")
    program = torch.export.export(block, (x,), strict=strict)
    assert torch.equal(program.module()(x), block(x))
    assert error(program.run_decompositions().module()(x), block(x)) < 1e-6


_ELSEWHERE = """
import sys, torch
inputs, path = torch.load(sys.argv[1]), sys.argv[2]
run = torch._inductor.aoti_load_package(path)
print(float((run(inputs["x"]) - inputs["y"]).norm() / inputs["y"].norm()))
assert not [name for name in sys.modules if name.startswith("fp8fx")], "fp8fx was imported"
"""


def _run(script: str, *arguments: object, **environment: str) -> str:
    ran = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.getcwd(), **environment},
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.mark.compiles
def test_an_aotinductor_package_runs_elsewhere(x: Tensor, tmp_path: Path) -> None:
    block = frozen_block("rowwise")
    program = torch.export.export(block, (x,))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "block.pt2"))
    torch.save({"x": x, "y": block(x)}, tmp_path / "inputs.pt")
    assert float(_run(_ELSEWHERE, tmp_path / "inputs.pt", package)) < 1e-6


_LOADED = """
import sys, torch, fp8fx
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from tests.weights.test_frozen_compiled import Block, frozen_block
torch.set_num_threads(1)  # which torch guards
saved = torch.load(sys.argv[1])
block = frozen_block("rowwise", seed=5)
block.load_state_dict(saved["state"])
with open(sys.argv[2], "rb") as file:
    call = torch.compiler.load_compiled_function(file)
print(float((call(block, saved["x"]) - saved["y"]).norm() / saved["y"].norm()))
assert counters["inductor"]["fxgraph_cache_miss"] == 0
assert counters["stats"]["unique_graphs"] <= 1, counters["stats"]  # that of freeze
"""


def step(model: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = model(x)
    return result


@pytest.mark.compiles
def test_what_aot_compile_saves_is_loaded_elsewhere(x: Tensor, tmp_path: Path) -> None:
    block = frozen_block("rowwise")
    compiled: Any = torch.compile(step, backend="fp8", fullgraph=True)
    compiled.aot_compile(((block, x), {})).save_compiled_function(str(tmp_path / "step"))
    torch.save({"x": x, "y": block(x), "state": block.state_dict()}, tmp_path / "inputs.pt")
    assert float(_run(_LOADED, tmp_path / "inputs.pt", tmp_path / "step")) < 1e-6


_CACHED = """
import sys, torch, fp8fx
from pathlib import Path
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config, cpu_vec_isa
from tests.weights.test_frozen_compiled import frozen_block
cpu_vec_isa.valid_vec_isa_list = list  # what vectors this CPU has takes longer to find out than all else
path = Path(sys.argv[1])
if path.exists():
    torch.compiler.load_cache_artifacts(path.read_bytes())
block, x = frozen_block("rowwise"), torch.ones(4, 64)
y = torch.compile(block, backend="fp8")(x)
assert float((y - block(x)).norm() / block(x).norm()) < 1e-6
if not path.exists():
    path.write_bytes(torch.compiler.save_cache_artifacts()[0])
print(counters["aot_autograd"]["autograd_cache_hit"], counters["aot_autograd"]["autograd_cache_miss"])
"""


@pytest.mark.compiles
def test_saved_cache_artifacts_spare_the_compiler(tmp_path: Path) -> None:
    path = tmp_path / "artifacts"
    first, second = (
        _run(_CACHED, path, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / place)) for place in ("here", "elsewhere")
    )
    assert first.split() == ["0", "1"]
    assert second.split() == ["1", "0"]
