"""Frozen weights on FP8 tensor cores: the ops, the kernel for one row, CUDA graphs, memory, what a block of Llama
becomes, and packages."""

from __future__ import annotations

import copy
import gc
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import fp8fx
from fp8fx.executors import weight_only
from fp8fx.executors.hardware import has_fp8_tensor_cores
from fp8fx.executors.scaled_mm import MAX_ROWS_SCALED_AFTER
from fp8fx.ops.matmul import op
from fp8fx.recipes.quantize import Quantized, quantize, sqnr
from fp8fx.recipes.recipe import RECIPES
from fp8fx.weights.store import STORE
from tests.support.freezing import check_copies, check_files, check_loads, check_moves, check_package, error
from tests.support.llama import WIDTH, Llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not has_fp8_tensor_cores(torch.device("cuda")), reason="needs a CUDA device of compute capability >= 8.9"
    ),
]

# What tensor cores' accumulation, which is not float32's, and rounding to the dtype may make of equal FP8 operands.
BOUNDS = {torch.float32: 3e-4, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# Summed in float32, rounded once.
EXACT = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}

dtypes = pytest.mark.parametrize("dtype", BOUNDS, ids=str)
recipes = pytest.mark.parametrize("recipe", RECIPES)


def frozen_weight(recipe: str, n: int, k: int, dtype: torch.dtype) -> Quantized:
    """Rows of different magnitude: another row's scale would show."""
    forward = RECIPES[recipe].forward
    assert forward is not None
    weight = torch.randn(n, k) * torch.logspace(-1, 1, n)[:, None]
    return quantize(weight.to("cuda", dtype), forward.rhs, 4096)


def multiply(recipe: str, weight: Quantized, executor: str = "auto", only: bool = False) -> Callable[..., Tensor]:
    def f(a: Tensor, bias: Tensor | None = None) -> Tensor:
        out: Tensor = op(recipe)(
            a, weight.data.t(), bias=bias, executor=executor, b_scale=weight.scale, weight_only=only
        )
        return out

    return f


def exact(a: Tensor, weight: Quantized, bias: Tensor | None = None) -> Tensor:
    assert weight.scale is not None
    out = a.double() @ (weight.data.double() * weight.scale.double()).t()
    return out if bias is None else out + bias.double()


# The ops.

SHAPES = [
    (1, 64, 64),
    (5, 64, 64),
    (17, 100, 50),
    (1, 33, 7),
    (MAX_ROWS_SCALED_AFTER, 128, 48),
    (MAX_ROWS_SCALED_AFTER + 1, 128, 48),
    (130, 4100, 48),
    (9, 5000, 4104),
]


@recipes
@dtypes
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_tensor_cores_are_the_simulation(
    with_bias: bool, m: int, k: int, n: int, dtype: torch.dtype, recipe: str
) -> None:
    weight, x, grad = frozen_weight(recipe, n, k, dtype), torch.randn(m, k), torch.randn(m, n).to("cuda", dtype)
    bias = torch.randn(n).to("cuda", dtype) if with_bias else None
    results = []
    for executor in ("scaled_mm", "simulated"):
        a = x.to("cuda", dtype).requires_grad_()
        out = multiply(recipe, weight, executor)(a, bias)
        results.append((out, *torch.autograd.grad(out, a, grad)))
    for value, expected in zip(*results, strict=True):
        assert (value.dtype, value.shape) == (expected.dtype, expected.shape)
        assert error(value, expected) <= BOUNDS[dtype]


@recipes
@dtypes
@pytest.mark.parametrize(("m", "n"), [(17, 64), (MAX_ROWS_SCALED_AFTER + 1, 16400)])
def test_a_frozen_weight_is_the_one_quantized_at_each_call(m: int, n: int, dtype: torch.dtype, recipe: str) -> None:
    forward = RECIPES[recipe].forward
    assert forward is not None
    a, weight = torch.randn(m, 256).to("cuda", dtype), torch.randn(n, 256).to("cuda", dtype)
    out, expected = multiply(recipe, quantize(weight, forward.rhs, 4096))(a), op(recipe)(a, weight.t())
    if (
        m <= MAX_ROWS_SCALED_AFTER and recipe != "global"
    ):  # scales of rows are multiplied after the GEMM where the weight is frozen, and by it where not
        assert error(out, expected) <= BOUNDS[dtype]
    else:
        assert torch.equal(out, expected)


# One row.


@recipes
@dtypes
@pytest.mark.parametrize(("k", "n"), [(1, 1), (33, 7), (64, 64), (2048, 48), (2049, 17), (4100, 130), (8192, 32)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_one_row_is_multiplied_as_it_is(with_bias: bool, k: int, n: int, dtype: torch.dtype, recipe: str) -> None:
    weight, a = frozen_weight(recipe, n, k, dtype), torch.randn(1, k).to("cuda", dtype)
    bias = torch.randn(n).to("cuda", dtype) if with_bias else None
    out = multiply(recipe, weight, only=True)(a, bias)
    assert (out.dtype, out.shape) == (dtype, (1, n))
    magnitudes = exact(a.abs(), Quantized(weight.data.float().abs(), weight.scale))
    distance, expected = (out.double() - exact(a, weight, bias)).abs(), exact(a, weight, bias).abs()
    assert (distance <= EXACT[dtype] * expected + 2e-6 * magnitudes + 6e-8).all()  # each value by itself


@recipes
@pytest.mark.parametrize("m", [2, 3, 4])
def test_several_rows_are_quantized(m: int, recipe: str) -> None:
    weight, a = frozen_weight(recipe, 64, 128, torch.bfloat16), torch.randn(m, 128).to("cuda", torch.bfloat16)
    assert torch.equal(multiply(recipe, weight, only=True)(a), multiply(recipe, weight)(a))


def test_a_value_of_the_scale_that_is_not_finite_stays_in_its_column() -> None:
    weight, a = frozen_weight("rowwise", 40, 100, torch.float32), torch.randn(1, 100, device="cuda")
    assert weight.scale is not None
    clean = weight_only.matmul(a, weight)
    scale = weight.scale.clone()
    scale[3], scale[7] = math.nan, math.inf
    out, others = weight_only.matmul(a, Quantized(weight.data, scale)), [i for i in range(40) if i not in (3, 7)]
    assert not out[0, [3, 7]].isfinite().any()
    assert torch.equal(out[0, others], clean[0, others])


@recipes
@dtypes
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_inductor_runs_the_kernel_for_one_row_alone(dynamic: bool, dtype: torch.dtype, recipe: str) -> None:
    weight, bias = frozen_weight(recipe, 50, 100, dtype), torch.randn(50).to("cuda", dtype)
    f = multiply(recipe, weight, only=True)
    compiled = torch.compile(lambda a: f(torch.relu(a), bias), fullgraph=True, dynamic=dynamic)
    for m in (7, 2, 3, 1, 4, 5, 1):
        a = torch.randn(m, 100).to("cuda", dtype)
        with torch.no_grad():
            out = compiled(a)
        if m == 1:
            assert error(out, exact(torch.relu(a), weight, bias)) <= 2 * EXACT[dtype]
        else:
            assert error(out, f(torch.relu(a), bias)) <= BOUNDS[dtype]


@recipes
def test_inductor_chooses_at_run_time_where_only_that_knows_the_rows(recipe: str) -> None:
    weight = frozen_weight(recipe, 48, 128, torch.bfloat16)
    f = multiply(recipe, weight, only=True)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True), torch.no_grad():
        compiled = torch.compile(lambda a, chosen: f(a[chosen]), fullgraph=True)
        for rows in (3, 1, 6, 1):
            a, chosen = torch.randn(6, 128).to("cuda", torch.bfloat16), torch.arange(6, device="cuda") < rows
            assert error(compiled(a, chosen), f(a[chosen])) <= BOUNDS[torch.bfloat16]


# Models.

ALWAYS: dict[str, Any] = {"freeze": True, "profit": "always"}


def block(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    return Llama().to("cuda", dtype).requires_grad_(False)


def tokens(*leading: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*leading, WIDTH, device="cuda", dtype=dtype)


@recipes
def test_a_block_of_llama_is_four_gemms(recipe: str) -> None:
    model, backend = block(), fp8fx.Backend(fp8fx.Config(recipe=recipe, **ALWAYS))
    with torch.no_grad():
        out, (code,) = run_and_get_code(torch.compile(model, backend=backend), tokens(2, 64))
    assert out.isfinite().all()
    assert code.count("extern_kernels._scaled_mm(") == 4  # qkv, o, gate and up, down
    assert "extern_kernels.mm(" not in code
    (report,) = backend.reports
    assert [row.name for row in report.rewritten] == [
        f"{name}.weight" for name in ("q", "k", "v", "o", "gate", "up", "down")
    ]
    assert "one GEMM with k.weight, v.weight" in report.rewritten[0].remark
    assert "one GEMM with up.weight" in report.rewritten[4].remark


@recipes
def test_a_single_token_is_not_quantized_where_that_is_faster(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fp8fx.profit.choice._is_weight_only", lambda *_: True)  # else the device's own times decide
    model, x = block(), tokens(1, 1)
    with torch.no_grad():
        compiled = torch.compile(model, backend="fp8", dynamic=False, options={"recipe": recipe, **ALWAYS})
        out, (code,) = run_and_get_code(compiled, x)
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                forward = RECIPES[recipe].forward
                assert forward is not None
                data, scale = quantize(layer.weight, forward.rhs, 4096)
                layer.weight.copy_(data.float() * scale)
        # Per row the same weights; else siblings share a scale. No activation is quantized.
        assert sqnr(model(x), out) > (35 if recipe == "rowwise" else 20)
    assert "gemv" in code
    assert "extern_kernels._scaled_mm(" not in code


@recipes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("leading", [(1, 1), (4, 1), (2, 64)], ids=str)
def test_a_frozen_block_is_as_close_to_high_precision_as_the_simulation(
    leading: tuple[int, ...], dtype: torch.dtype, recipe: str
) -> None:
    model, x = block(dtype), tokens(*leading, dtype=dtype)
    with torch.no_grad():
        reference, simulation = model(x), fp8fx.convert(model, recipe=recipe, executor="simulated")(x)
        compiled = torch.compile(model, backend="fp8", options={"recipe": recipe, **ALWAYS})(x)
        converted = fp8fx.convert(model, (x,), recipe=recipe, **ALWAYS)(x)
    for out in (compiled, converted):
        assert sqnr(reference, out) > sqnr(reference, simulation) - 1.0  # dB


@pytest.mark.parametrize("length", [1, 64])
def test_cuda_graphs_read_new_inputs_and_changed_weights(length: int) -> None:
    model, other = block(), block()
    compiled = torch.compile(model, backend="fp8", dynamic=False, options={"mode": "reduce-overhead", **ALWAYS})
    with torch.no_grad():
        for weights in (copy.deepcopy(model), other):
            fresh = fp8fx.convert(weights, **ALWAYS)
            for _ in range(4):  # a CUDA graph warms up, records, then replays over new inputs
                x = tokens(1, length)
                torch.compiler.cudagraph_mark_step_begin()
                assert sqnr(fresh(x), compiled(x).clone()) > 20
            model.load_state_dict(other.state_dict())
    assert len(STORE.entries(model.parameters())) == 4


def allocated() -> int:
    gc.collect()
    torch.cuda.synchronize()
    # What was asked for: a block of two megabytes that the allocator has left is not split for one.
    return int(torch.cuda.memory_stats()["requested_bytes.all.current"])


def test_a_converted_block_takes_half_of_bfloat16s_memory() -> None:
    model = Llama(1024, 8).to("cuda", torch.bfloat16).requires_grad_(False)
    weights, before = sum(p.nbytes for p in model.parameters()), allocated()
    gm = fp8fx.convert(model, **ALWAYS)
    assert allocated() - before <= 0.53 * weights
    del model
    assert allocated() - (before - weights) <= 0.53 * weights
    assert gm(torch.randn(1, 16, 1024, device="cuda").bfloat16()).isfinite().all()


# What the CPU's tests hold, too.


@recipes
@pytest.mark.parametrize("check", [check_files, check_copies, check_loads, check_moves])
def test_files_copies_loads_and_moves(check: Callable[[str, str], None], recipe: str) -> None:
    check("cuda", recipe)


_PLAIN = """
import sys, torch
model, x = torch.nn.Linear(64, 64, device="cuda").requires_grad_(False), torch.randn(4, 64, device="cuda")
package = torch._inductor.aoti_compile_and_package(torch.export.export(model, (x,)), package_path=sys.argv[1])
torch.testing.assert_close(torch._inductor.aoti_load_package(package)(x), model(x), rtol=1e-3, atol=1e-3)
"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> None:
    """That a package of a plain nn.Linear runs: not where the C++ compiler links libstdc++ statically; then set CXX to
    another."""
    package = tmp_path_factory.mktemp("plain") / "model.pt2"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _PLAIN, str(package)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        last, compiler = (done.stderr.strip().splitlines() or ["no message"])[-1], os.environ.get("CXX", "g++")
        pytest.skip(
            f"with {compiler} a package of a plain nn.Linear does not run either: exit status {done.returncode}, {last}"
        )


@recipes
@pytest.mark.usefixtures("packages")
def test_an_aotinductor_package_runs_without_us(recipe: str, tmp_path: Path) -> None:
    check_package(tmp_path, "cuda", recipe, (4, 1, 3), dynamic=True)


@pytest.mark.usefixtures("packages")
def test_an_aotinductor_package_of_a_single_row(tmp_path: Path) -> None:
    check_package(tmp_path, "cuda", "global", (1,), dynamic=False)
