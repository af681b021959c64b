"""One row times an FP8 weight: what the kernel is launched with, and, in Triton's interpreter, what it computes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fp8fx.executors import scaled_mm, weight_only
from fp8fx.executors.scaled_mm import ScaledMM
from fp8fx.recipes.formats import E5M2
from fp8fx.recipes.quantize import Quantized, quantize
from fp8fx.recipes.recipe import RECIPES, Cast

pytest.importorskip("triton", reason="Triton is a requirement of the tests on Linux x86-64 alone")

ROOT = Path(__file__).parent.parent.parent
ROUNDING = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 8e-3}  # the interpreter truncates to bfloat16
# N, K. Four rows to a program, and of each 4096, 2048 or 1024 values at once: whole and broken numbers of both.
SIZES = [(1, 1), (7, 33), (17, 64), (3, 100), (2, 2048), (3, 2049), (4, 4100), (8, 3072), (4, 6144), (5, 8192)]
RECIPE_OF = {"one scale": "global", "a scale a row": "rowwise"}

# Triton reads the variable when it is first imported, so the kernel runs in a process of its own: all cases in one.
SCRIPT = """
import sys, torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from fp8fx.executors import weight_only
from fp8fx.recipes.quantize import Quantized

new_empty = Tensor.new_empty
# all of it has to be written
Tensor.new_empty = lambda x, *shape, **options: new_empty(x, *shape, **options).fill_(float("nan"))
weight_only.wrap_triton = lambda kernel: kernel
cases = torch.load(sys.argv[1])
results = {name: weight_only.matmul(x, Quantized(data, scale), bias) for name, (x, data, scale, bias) in cases.items()}
torch.save(results, sys.argv[1])
"""


class Case(NamedTuple):
    x: Tensor
    data: Tensor
    scale: Tensor
    bias: Tensor | None

    @property
    def exact(self) -> Tensor:
        out = self.x.double() @ (self.data.double() * self.scale.double()).t()
        return out if self.bias is None else out + self.bias.double()


def weight(scales: str, n: int, k: int) -> Quantized:
    forward = RECIPES[RECIPE_OF[scales]].forward
    assert forward is not None
    # Rows of different magnitude: another row's scale would show.
    return quantize(torch.randn(n, k) * torch.logspace(-2, 2, n)[:, None], forward.rhs, 4096)


def case(scales: str, n: int, k: int, dtype: torch.dtype, bias: bool = False) -> Case:
    data, scale = weight(scales, n, k)
    assert scale is not None
    return Case(torch.randn(1, k).to(dtype), data, scale, torch.randn(n).to(dtype) if bias else None)


def bias_of_every_other(bias: Tensor) -> Tensor:
    return bias.repeat_interleave(2)[::2]


def every_case() -> dict[str, Case]:
    torch.manual_seed(0)
    cases = {
        f"{scales} {n}x{k} {dtype} {bias}": case(scales, n, k, dtype, bias)
        for scales in RECIPE_OF
        for n, k in SIZES
        for dtype in ROUNDING
        for bias in (False, True)
    }
    base = case("a scale a row", 5, 100, torch.float32, True)
    assert base.bias is not None
    scale, bias = base.scale.clone(), base.bias.clone()
    scale[2], scale[3], bias[1] = math.nan, math.inf, math.nan
    x = base.x.clone()
    x[0, 99] = math.inf
    cases |= {
        "base": base,
        "scales of two rows": base._replace(scale=scale),
        "NaN in the bias": base._replace(bias=bias),
        "infinite input": base._replace(x=x),
        "strided input": base._replace(x=base.x.repeat_interleave(2, 1)[:, ::2]),
        "strided bias": base._replace(bias=bias_of_every_other(base.bias)),
        "strided weight": base._replace(data=base.data.t().contiguous().t()),
        "an input with a view's offset": base._replace(x=torch.cat([torch.full((1, 100), math.nan), base.x])[1:]),
        "past the first block": case("one scale", 3, 4096 + 5, torch.bfloat16),
        "e5m2": base._replace(data=quantize(torch.randn(5, 100), Cast(E5M2, "tensor"), 4096).data),
    }
    return cases


CASES = every_case()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    path = tmp_path_factory.mktemp("weight_only") / "cases.pt"
    torch.save({name: tuple(one) for name, one in CASES.items()}, path)
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Tensor] = torch.load(path)
    return found


def error(x: Tensor, reference: Tensor) -> float:
    return float((x.double() - reference).norm() / reference.norm())


@pytest.mark.slow
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(("n", "k"), SIZES)
@pytest.mark.parametrize("scales", RECIPE_OF)
def test_the_product_is_that_of_the_dequantized_weight(
    scales: str, n: int, k: int, dtype: torch.dtype, bias: bool, results: dict[str, Tensor]
) -> None:
    name = f"{scales} {n}x{k} {dtype} {bias}"
    assert (results[name].dtype, results[name].shape) == (dtype, (1, n))
    magnitudes = CASES[name]._replace(x=CASES[name].x.abs(), data=CASES[name].data.float().abs(), bias=None).exact
    distance = (results[name].double() - CASES[name].exact).abs()
    assert (distance <= ROUNDING[dtype] * CASES[name].exact.abs() + 1e-6 * magnitudes).all()  # each value by itself


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rows"), [("scales of two rows", [2, 3]), ("NaN in the bias", [1]), ("infinite input", [0, 1, 2, 3, 4])]
)
def test_what_is_not_finite_spoils_what_it_belongs_to_and_nothing_else(
    name: str, rows: list[int], results: dict[str, Tensor]
) -> None:
    others = [i for i in range(5) if i not in rows]
    assert not results[name][0, rows].isfinite().any()
    assert torch.equal(results[name][0, others], results["base"][0, others])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["strided input", "strided bias", "strided weight", "an input with a view's offset"])
def test_memory_layout_makes_no_difference(name: str, results: dict[str, Tensor]) -> None:
    assert torch.equal(results[name], results["base"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["past the first block", "e5m2"])
def test_other_operands(name: str, results: dict[str, Tensor]) -> None:
    assert error(results[name], CASES[name].exact) <= ROUNDING[results[name].dtype]


# The launch.

Launches = list[tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """What would have been launched: the grid and the arguments."""
    seen: Launches = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args, **kwargs: seen.append((grid, args, kwargs))

    monkeypatch.setattr(weight_only, "wrap_triton", lambda kernel: Kernel())
    return seen


BLOCKS = [(1, 1), (2, 2), (33, 64), (64, 64), (2047, 2048), (2048, 2048), (3072, 1024), (4100, 4096), (14336, 2048)]


@pytest.mark.parametrize(("k", "block"), BLOCKS)
@pytest.mark.parametrize("scales", RECIPE_OF)
def test_a_program_for_four_outputs_and_blocks_without_a_rest_if_the_row_has_such(
    scales: str, k: int, block: int, launches: Launches
) -> None:
    x, q, bias = torch.randn(1, k), weight(scales, 5, k), torch.randn(5)
    out = weight_only.matmul(x, q, bias)
    ((grid, args, kwargs),) = launches
    assert grid == (2,)
    assert args[3] is bias
    assert args[4] is out
    assert kwargs == {
        "outputs": 5,
        "features": k,
        "scale_a_row": scales == "a scale a row",
        "rows": 4,
        "block": block,
    }
    assert all(y.is_contiguous() for y in args)


def test_all_traced_calls_are_of_one_kernel() -> None:
    x, q = torch.randn(1, 64), weight("one scale", 16, 64)

    def calls(x: Tensor) -> list[Tensor]:
        return [weight_only.matmul(x, q) for _ in range(3)]

    gm = make_fx(calls, tracing_mode="fake", _allow_non_fake_inputs=True)(x)
    kernels = {node.kwargs["kernel_idx"] for node in gm.graph.nodes if "kernel_idx" in node.kwargs}
    assert len(kernels) == 1


def test_values_that_are_not_quantized_go_to_it_and_others_do_not(
    launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, q = torch.randn(1, 64), weight("one scale", 16, 64)
    out = ScaledMM().matmul(Quantized(x, None), q, block=64, dtype=torch.float32)
    assert len(launches) == weight_only.ROWS == 1
    assert (out.shape, out.dtype) == ((1, 16), torch.float32)
    called: list[Tensor] = []
    monkeypatch.setattr(
        scaled_mm, "scaled_mm", lambda a, b, *_, **options: called.append(a) or a.new_zeros(a.shape[0], b.shape[1])
    )
    ScaledMM().matmul(quantize(x, Cast(E5M2, "tensor"), 64), q, block=64, dtype=torch.float32)
    assert len(launches) == len(called) == 1
