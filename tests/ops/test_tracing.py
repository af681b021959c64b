"""torch.ops.fp8fx.matmul_fp8_*, by every way to trace it: compiled, exported, opened by make_fx, and what torch asks of
an op."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

from fp8fx.executors import hardware
from fp8fx.ops.matmul import op
from tests.support.contract import error, recipes


def step(a: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Both ops, as a model would call them."""
    return (
        torch.ops.fp8fx.matmul_fp8_mixed(a, weight.t(), bias=bias),
        torch.ops.fp8fx.matmul_fp8_global(torch.relu(a), weight.t()),
    )


def train(
    f: Callable[..., tuple[Tensor, ...]], operands: tuple[Tensor, ...], grads: tuple[Tensor, ...]
) -> list[Tensor]:
    """Outputs and gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in operands]
    outs = f(*leaves)
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, grads)]


def integers(largest: int, *shape: int) -> Tensor:
    """Whole numbers whose first column holds `largest`."""
    x = torch.randint(-largest, largest + 1, shape).float()
    x[..., 0] = largest
    return x


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.compiles)])
def test_compiled_is_eager(backend: str, dynamic: bool) -> None:
    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=dynamic)
    # Scales of 1 and 2**-13 and sums below 2**24: exact in any order, so that only another FP8 value could make a
    # difference.
    exact = (integers(240, 6, 100), integers(240, 50, 100), integers(9, 50)), (integers(7, 6, 50), integers(7, 6, 50))
    for value, expected in zip(train(compiled, *exact), train(step, *exact), strict=True):
        assert torch.equal(value, expected)
    # Any numbers: Inductor may lay a GEMM's operand out differently, and BLAS then sums in another order.
    anything = (torch.randn(6, 100), torch.randn(50, 100), torch.randn(50)), (torch.randn(6, 50), torch.randn(6, 50))
    for value, expected in zip(train(compiled, *anything), train(step, *anything), strict=True):
        assert (value.dtype, value.shape) == (expected.dtype, expected.shape)
        assert error(value, expected) <= (0 if backend == "aot_eager" else 3e-7)


def compilations(backend: str, executor: str, training: bool) -> int:
    """How often the op is compiled for batches of varying size."""
    counter = CompileCounterWithBackend(backend)

    def f(a: Tensor, b: Tensor) -> Tensor:
        out: Tensor = torch.ops.fp8fx.matmul_fp8_global(a, b, executor=executor)
        # Before torch 2.13 the CPU's _scaled_mm takes no scale per row.
        return out if executor == "scaled_mm" else out + torch.ops.fp8fx.matmul_fp8_mixed(a, b, executor=executor)

    torch._dynamo.reset()
    compiled, b = torch.compile(f, backend=counter, fullgraph=True), torch.randn(40, 24, requires_grad=training)
    for m in (16, 17, 18, 33, 32, 31, 200, 1, 0):  # padding to 16 by nothing, by one and by more: one graph for all
        out = compiled(torch.randn(m, 40, requires_grad=training), b)
        assert out.shape == (m, 24)
        if training:
            out.sum().backward()
    return int(counter.frame_count)


@pytest.fixture
def tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the executor scaled_mm run on the CPU."""
    monkeypatch.setattr(hardware, "has_fp8_tensor_cores", lambda device: True)


@pytest.mark.slow
@pytest.mark.usefixtures("tensor_cores")
@pytest.mark.parametrize("executor", ["simulated", "scaled_mm"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_a_varying_batch_is_compiled_no_more_often_than_any_op(training: bool, executor: str) -> None:
    assert compilations("aot_eager", executor, training) == compilations("eager", executor, training)


@recipes
def test_a_batch_known_only_at_run_time(recipe: str) -> None:
    def f(a: Tensor, chosen: Tensor, b: Tensor) -> Tensor:
        out: Tensor = op(recipe)(a[chosen], b)
        return out

    a, b = torch.randn(6, 100), torch.randn(100, 50, requires_grad=True)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
        for rows in (3, 1, 0):  # an expert that no token was routed to
            chosen = torch.arange(6) < rows
            results = [(out := g(a, chosen, b), *torch.autograd.grad(out.sum(), b)) for g in (compiled, f)]
            assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def fp8fx_calls(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if "fp8fx" in str(node.target)]


@recipes
@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_make_fx_opens_it(tracing_mode: str, recipe: str) -> None:
    a, b = torch.randn(5, 100), torch.randn(100, 50)
    graph = make_fx(op(recipe), tracing_mode=tracing_mode)(a, b)
    assert fp8fx_calls(graph.graph) == []
    assert any(torch.float8_e4m3fn in node.kwargs.values() for node in graph.graph.nodes)
    assert torch.equal(graph(a, b), op(recipe)(a, b))


class Model(nn.Module):
    def __init__(self, recipe: str) -> None:
        super().__init__()
        self.recipe = recipe
        self.weight = nn.Parameter(torch.randn(50, 100))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = op(self.recipe)(x, self.weight.t())
        return out


@pytest.mark.slow
@recipes
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_export_keeps_one_node_and_decompositions_open_it(dynamic: bool, recipe: str) -> None:
    model, a = Model(recipe), torch.randn(5, 100)
    exported = torch.export.export(model, (a,), dynamic_shapes=({0: torch.export.Dim("m")},) if dynamic else None)
    assert fp8fx_calls(exported.graph) == [f"fp8fx.matmul_fp8_{recipe}.default"]
    opened = exported.run_decompositions()
    assert fp8fx_calls(opened.graph) == []
    for x in (a, torch.randn(9, 100)) if dynamic else (a,):
        assert torch.equal(exported.module()(x), model(x))
        assert torch.equal(opened.module()(x), model(x))


@pytest.mark.slow
@pytest.mark.usefixtures("tensor_cores")
@recipes
def test_export_opens_it_to_scaled_mm_of_any_batch(recipe: str) -> None:
    # Whatever fixed M would raise here.
    exported = torch.export.export(Model(recipe), (torch.randn(5, 100),), dynamic_shapes=({0: torch.export.Dim("m")},))
    products = [
        node for node in exported.run_decompositions().graph.nodes if node.target is torch.ops.aten._scaled_mm.default
    ]
    assert len(products) == 1
    m, n = products[0].meta["val"].shape
    assert not isinstance(m, int)
    assert n == 64  # 50, aligned


@pytest.mark.slow
@recipes
@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck(recipe: str, with_bias: bool) -> None:
    a, b, bias = (
        torch.randn(2, 3, 100, requires_grad=True),
        torch.randn(100, 50, requires_grad=True),
        torch.randn(50, requires_grad=True),
    )
    # Without test_schema: it compares the float8 intermediates with allclose, which multiplies them, and float8 has no
    # mul kernel on the CPU. The three tests below check the schema instead.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    results = torch.library.opcheck(op(recipe), (a, b), {"bias": bias if with_bias else None}, test_utils=checks)
    assert results == dict.fromkeys(checks, "SUCCESS")


@recipes
def test_schema_is_the_contract(recipe: str) -> None:
    arguments = 'Tensor a, Tensor b, int bsz=-1, int bsz2=-1, *, Tensor? bias=None, str executor="auto"'
    gemms, frozen = (
        "bool forward=True, bool dgrad=True, bool wgrad=True",
        "Tensor? b_scale=None, bool weight_only=False",
    )
    assert str(op(recipe)._schema) == f"fp8fx::matmul_fp8_{recipe}({arguments}, {gemms}, {frozen}) -> Tensor"
    assert torch.Tag.pt2_compliant_tag in op(recipe).tags


SCHEMA_SHAPES = [(5, 100, 50), (16, 64, 64), (0, 64, 48), (5, 0, 48)]


@recipes
@pytest.mark.parametrize("shape", SCHEMA_SHAPES, ids=str)
def test_inputs_are_not_mutated(shape: tuple[int, int, int], recipe: str) -> None:
    m, k, n = shape
    operands = [
        torch.randn(m, k, requires_grad=True),
        torch.randn(k, n, requires_grad=True),
        torch.randn(n, requires_grad=True),
    ]
    before, versions = [x.detach().clone() for x in operands], [x._version for x in operands]
    op(recipe)(*operands[:2], bias=operands[2]).sum().backward()
    assert [x._version for x in operands] == versions
    assert all(torch.equal(x, y) for x, y in zip(operands, before, strict=True))


@recipes
@pytest.mark.parametrize("shape", SCHEMA_SHAPES, ids=str)
def test_the_output_aliases_no_input(shape: tuple[int, int, int], recipe: str) -> None:
    m, k, n = shape
    operands = [torch.randn(m, k), torch.randn(k, n), torch.randn(n)]
    storages = {x.untyped_storage()._cdata for x in operands}
    for bias in (None, operands[2]):
        assert op(recipe)(*operands[:2], bias=bias).untyped_storage()._cdata not in storages
