"""If Triton's assembler writes FP8 values wrong, no kernel of Inductor's stores them in two layouts."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, fx, nn
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import run_and_get_code

import fp8fx
from fp8fx.executors import row_major as module
from fp8fx.executors.row_major import row_major
from fp8fx.lowering import Hook
from fp8fx.recipes.recipe import RECIPES
from fp8fx.triton_internals import Assembler, ptxas

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
COPY = torch.ops.fp8fx.row_major.default


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """The compute capabilities that an assembler was asked for; each test sets which it is."""
    capabilities: list[tuple[int, int]] = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, index))
    module._is_miscompiled.cache_clear()
    yield capabilities
    module._is_miscompiled.cache_clear()


@pytest.mark.parametrize("release", [(12, 8), (12, 9)], ids=str)
def test_an_assembler_before_cuda_13_is_told_once_for_a_device(
    release: tuple[int, int], asked: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        module, "ptxas", lambda capability: asked.append(capability) or Assembler((3, 8, 0), "bin/ptxas", release)
    )
    with pytest.warns(
        fp8fx.FP8Warning, match=rf"Triton 3\.8\.0 uses bin/ptxas of CUDA 12\.{release[1]}, .*set TRITON_PTXAS_PATH"
    ):
        assert module._is_miscompiled(0)
    assert module._is_miscompiled(0)
    assert asked == [(9, 0)]


@pytest.mark.parametrize(
    "found",
    [
        Assembler((3, 9, 0), "ptxas", (13, 4)),
        Assembler((3, 8, 0), "ptxas", (13, 0)),
        Assembler((3, 6, 0), "ptxas", (12, 8)),
        None,
    ],
    ids=str,
)
def test_others_are_right(
    found: Assembler | None, asked: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ptxas", lambda capability: asked.append(capability) or found)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not module._is_miscompiled(1)
    assert asked == [(9, 1)]


def test_the_assembler_of_the_installed_triton() -> None:
    triton = pytest.importorskip("triton")
    found = ptxas((9, 0))
    assert found is not None
    assert ".".join(map(str, found.triton)) == triton.__version__.partition("+")[0]
    assert (12, 0) <= found.release < (20, 0)


def test_a_cpu_asks_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_is_miscompiled", lambda index: pytest.fail("asked"))
    x = torch.randn(4, 8)
    assert row_major(x) is x
    assert row_major(x.t()).stride() == (4, 1)


@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_the_copy(dtype: torch.dtype) -> None:
    x = torch.randn(6, 5).to(dtype)
    for laid in (x, x.t(), x[::2], x[:, 1:4]):
        copy = COPY(laid)
        assert copy.is_contiguous()
        assert copy.data_ptr() != laid.data_ptr()
        assert torch.equal(copy.view(torch.uint8), laid.contiguous().view(torch.uint8))
    torch.library.opcheck(
        COPY, (x.t(),), test_utils=("test_autograd_registration", "test_faketensor")
    )  # no others take FP8


class Kept(CustomGraphPass):
    """Inductor's final graphs."""

    def __init__(self) -> None:
        self.graphs: list[fx.Graph] = []

    def __call__(self, graph: fx.Graph) -> None:
        self.graphs.append(graph)

    def uuid(self) -> None:
        return None  # no caching


def copies(graph: fx.Graph) -> list[fx.Node]:
    """The nodes of Inductor's that lay FP8 values out anew."""
    clone = torch.ops.aten.clone.default
    return [node for node in graph.nodes if node.target is clone and node.meta["val"].dtype in FP8]


@pytest.mark.compiles
@pytest.mark.parametrize("recipe", RECIPES)
def test_inductor_lays_out_no_fp8_value(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 32)), torch.randn(16, 48, requires_grad=True)

    def step() -> tuple[list[Tensor], Kept]:
        kept = Kept()
        options = {"recipe": recipe, "profit": "always", "post_grad_custom_post_pass": kept}
        torch._dynamo.reset()
        out = torch.compile(model, backend="fp8", options=options)(x)
        return [out, *torch.autograd.grad(out.square().sum(), [x, *model.parameters()])], kept

    values, plain = step()
    monkeypatch.setattr(module, "_wants_own_kernel", lambda device: True)
    guarded, kept = step()
    for value, expected in zip(guarded, values, strict=True):
        assert torch.equal(value, expected)
    found = [node.target for graph in kept.graphs for node in graph.nodes if node.target is COPY]
    assert [node for graph in kept.graphs for node in copies(graph)] == []
    if recipe == "mixed":  # whose weight gradients are in high precision
        assert not [node for graph in plain.graphs for node in copies(graph)]
    else:
        assert (
            len(found) == len([node for graph in plain.graphs for node in copies(graph)]) == 4
        )  # both operands of two wgrads


@pytest.mark.compiles
@pytest.mark.parametrize("recipe", ["global", "rowwise"])
def test_the_kernel_that_casts_writes_in_the_layout_that_it_reads(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_wants_own_kernel", lambda device: True)
    model, x = nn.Linear(48, 64), torch.randn(16, 48, requires_grad=True)
    compiled = torch.compile(model, backend="fp8", options={"recipe": recipe, "profit": "always"})
    _, sources = run_and_get_code(lambda: compiled(x).square().sum().backward())
    source = "\n".join(sources)
    copied = re.findall(r"= torch\.ops\.fp8fx\.row_major\.default\((\w+)\)", source)
    assert len(copied) == 2  # the input and the gradient, transposed for wgrad
    for name, columns in zip(copied, (48, 64), strict=True):
        assert re.search(rf"{name} = empty_strided_cpu\(\({columns}, 16\), \(1, {columns}\), torch\.float8", source)


def test_the_verdict_is_part_of_the_compile_caches_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = []
    for miscompiled in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(module, "_is_miscompiled", lambda index, verdict=miscompiled: verdict)
        assert module.verdicts() == (miscompiled,)
        keys.append(Hook(fp8fx.Config(), ()).uuid())
    assert keys[0] != keys[1]
