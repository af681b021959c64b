"""Every executor of the table keeps the contract of `executor.py`; a new member is tested here without an edit."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fp8fx
from fp8fx.config import Config
from fp8fx.errors import ConfigError, ExecutorError
from fp8fx.executors import registry
from fp8fx.executors.executor import Executor
from fp8fx.executors.registry import AUTO, EXECUTORS, resolve
from fp8fx.executors.simulated import Simulated
from fp8fx.ops import matmul
from fp8fx.ops.operands import DTYPES
from fp8fx.recipes.quantize import Quantized, quantize_experts
from fp8fx.recipes.recipe import GEMMS, RECIPES, Cast, Gemm

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
DEVICES = [CPU, *([torch.device("cuda")] if torch.cuda.is_available() else [])]

# The largest error of a product against the simulated one, relative to its norm: the product's own rounding if the
# executor multiplies the same FP8 values; twice the rounding of E5M2's two bits if it has code tables of its own.
SAME_VALUES = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
OWN_VALUES = 0.15

# Where an executor runs: on this CPU if it can; on a GPU by `pytest -m gpu`.
_ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
PLACES = [(executor, CPU, []) for executor in EXECUTORS.values() if executor.available(CPU)]
PLACES += [(executor, torch.device("cuda"), _ON_GPU) for executor in EXECUTORS.values()]

executors = pytest.mark.parametrize("executor", EXECUTORS.values(), ids=lambda executor: executor.name)
places = pytest.mark.parametrize(
    ("executor", "device"),
    [
        pytest.param(executor, device, marks=marks, id=f"{executor.name} on {device}")
        for executor, device, marks in PLACES
    ],
)
devices = pytest.mark.parametrize("device", DEVICES, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
gemms = pytest.mark.parametrize(
    "gemm",
    [
        pytest.param(getattr(recipe, name), id=f"{recipe.name} {name}")
        for recipe in RECIPES.values()
        for name in GEMMS
        if getattr(recipe, name) is not None
    ],
)


def available(executor: Executor, device: torch.device) -> Executor:
    """The executor, ready; skips the test if this GPU is not one of its own."""
    if not executor.available(device):
        pytest.skip(f"{executor.name} {executor.why_unavailable(device)}")
    executor.prepare()
    return executor


def error(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def bound(executor: Executor, dtype: torch.dtype) -> float:
    return SAME_VALUES[dtype] if executor.keeps_fp8_weights else OWN_VALUES


@executors
def test_it_has_each_capability(executor: Executor) -> None:
    cls = type(executor)
    assert executor.name != AUTO and executor.name.isidentifier()
    assert EXECUTORS[executor.name] is executor
    assert vars(cls).keys() >= {"name", "tensor_cores", "keeps_fp8_weights"}, "each is written down, none inherited"
    assert type(executor.tensor_cores) is type(executor.keeps_fp8_weights) is bool
    assert vars(executor) == {}, "it has no state"


@executors
@devices
def test_it_is_available_or_says_why_not(executor: Executor, device: torch.device) -> None:
    for groups, why in ((False, executor.why_unavailable(device)), (True, executor.why_no_groups(device))):
        if not executor.available(device) or (groups and not executor.groups(device)):
            assert why
            with pytest.raises(
                ExecutorError, match=f"^executor '{executor.name}' .*use executor='{list(EXECUTORS)[-1]}'"
            ):
                resolve(executor.name, device, groups=groups)
        else:
            assert why is None
            assert resolve(executor.name, device, groups=groups) is executor


@devices
@pytest.mark.parametrize("groups", [False, True])
def test_auto_is_the_first_that_suits_the_device(device: torch.device, groups: bool) -> None:
    suitable = [e for e in EXECUTORS.values() if e.is_automatic(device) and (e.groups(device) or not groups)]
    assert resolve(AUTO, device, groups=groups) is suitable[0]
    assert suitable[-1] is list(EXECUTORS.values())[-1], "the last runs everywhere"
    assert all(executor.available(device) for executor in suitable)


@places
@gemms
@dtypes
def test_its_product_is_the_simulated_one(
    executor: Executor, device: torch.device, gemm: Gemm, dtype: torch.dtype
) -> None:
    available(executor, device)
    lhs, rhs, bias = torch.randn(80, 256), torch.randn(48, 256), torch.randn(48)
    lhs, rhs, bias = (x.to(device, dtype) for x in (lhs, rhs, bias))
    products = [
        e.matmul(e.quantize(lhs, gemm.lhs, 128), e.quantize(rhs, gemm.rhs, 128), block=128, dtype=dtype, bias=bias)
        for e in (executor, Simulated())
    ]
    assert (products[0].shape, products[0].dtype) == ((80, 48), dtype)
    assert error(*products) <= bound(executor, dtype)


@places
def test_its_groups_are_the_simulated_ones(executor: Executor, device: torch.device) -> None:
    available(executor, device)
    if not executor.groups(device):
        pytest.skip(f"{executor.name} {executor.why_no_groups(device)}")
    x, weights = (torch.randn(*shape).to(device, torch.bfloat16) for shape in ((40, 64), (3, 48, 64)))
    offs = torch.tensor([8, 8, 40], dtype=torch.int32, device=device)
    forward = RECIPES["rowwise"].forward
    assert forward is not None
    products = [
        e.grouped_matmul(
            e.quantize(x, Cast(forward.lhs.format, "row"), -1),
            quantize_experts(weights, forward.rhs, e.quantize),
            offs,
            dtype=torch.bfloat16,
        )
        for e in (executor, Simulated())
    ]
    assert (products[0].shape, products[0].dtype) == ((40, 48), torch.bfloat16)
    assert error(*products) <= bound(executor, torch.bfloat16)


@places
def test_it_keeps_fp8_values_if_it_says_so(executor: Executor, device: torch.device) -> None:
    available(executor, device)
    quantized = executor.quantize(
        torch.randn(4, 64, device=device), Cast(RECIPES["global"].forward.rhs.format, "tensor"), 64
    )
    assert (quantized.scale is not None) == executor.keeps_fp8_weights
    assert (quantized.data.element_size() == 1) == executor.keeps_fp8_weights


@places
@pytest.mark.parametrize("recipe", RECIPES)
def test_it_is_reached_by_its_name_through_the_op(
    executor: Executor, device: torch.device, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    available(executor, device)
    calls: list[Quantized] = []
    multiply = executor.matmul
    monkeypatch.setattr(
        type(executor), "matmul", lambda self, lhs, *args, **kwargs: calls.append(lhs) or multiply(lhs, *args, **kwargs)
    )
    a, b = torch.randn(5, 64, device=device), torch.randn(64, 32, device=device)
    assert matmul.op(recipe)(a, b, executor=executor.name).shape == (5, 32)
    assert calls


class Toy(Simulated):
    """A second executor with tensor cores: this class, and a line in the table."""

    name = "toy"
    tensor_cores = True
    keeps_fp8_weights = True


@pytest.mark.parametrize("freeze", [False, True])
def test_a_second_executor_with_tensor_cores_is_one_class_and_one_entry(
    freeze: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="unknown executor 'toy'"):
        Config(executor="toy")
    monkeypatch.setitem(registry.EXECUTORS, "toy", Toy())
    model, x = (
        nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32)).eval().requires_grad_(False),
        torch.randn(4, 64),
    )
    converted = fp8fx.convert(model, executor="toy", freeze=freeze, profit="always")
    report = converted.meta["fp8fx_report"]
    assert torch.equal(converted(x), fp8fx.convert(model, executor="simulated", profit="always")(x))
    assert [row.op for row in report.rewritten] == ["matmul_fp8_mixed"] * 2
    compiled = fp8fx.Backend(Config(executor="toy", profit="always")).explain(model, x)
    assert [row.executor for row in compiled.rewritten] == ["toy", "toy"]


def test_the_order_of_the_table_is_what_auto_prefers(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy()
    monkeypatch.setattr(registry, "EXECUTORS", {"toy": toy, **EXECUTORS})
    assert resolve(AUTO, CPU) is resolve(AUTO, CPU, groups=True) is toy


def literals(source: str) -> Iterator[str]:
    """The texts in a source file, but what it exports."""
    tree = ast.parse(source)
    exports = [
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    exported = {id(node) for value in exports for node in ast.walk(value)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in exported:
            yield node.value


def test_no_file_outside_this_room_names_an_executor() -> None:
    sources = {*(ROOT / "fp8fx").rglob("*.py"), *(ROOT / "passes").rglob("*.py")}
    outside = [path for path in sources if "executors" not in path.relative_to(ROOT).parts]
    assert len(outside) > 50
    assert {path.name: named for path in outside if (named := set(EXECUTORS) & {*literals(path.read_text())})} == {}


def test_the_reader_of_literals_reads() -> None:
    """The test above would pass on a reader that finds nothing."""
    assert "scaled_mm" in literals((ROOT / "fp8fx/executors/scaled_mm.py").read_text())
    assert [*literals('__all__ = ["simulated"]\nif name == "simulated": pass')] == ["simulated"]
