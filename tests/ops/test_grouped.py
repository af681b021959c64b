"""Grouped matmuls: the op against experts multiplied one by one, its gradients, what is refused, and the rewrite that finds them."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.autograd import forward_ad

import fp8fx
from fp8fx.config import Config
from fp8fx.errors import ConfigError, DifferentiationError, DTypeError, ExecutorError, ShapeError
from fp8fx.executors.scaled_mm import ScaledMM
from fp8fx.executors.simulated import Simulated
from fp8fx.ops import grouped_mm as grouped
from fp8fx.ops.matmul import op as linear_op
from fp8fx.passes.rewrite import decide
from fp8fx.recipes.quantize import quantize
from fp8fx.recipes.recipe import RECIPES
from tests.support.agreement import Lowered
from tests.support.capture import Capture, ops

recipes = pytest.mark.parametrize("recipe", list(RECIPES))

OFFS = torch.tensor([5, 5, 20, 34], dtype=torch.int32)  # the second expert gets nothing, three rows are nobody's
ROWS, K, N = 37, 64, 48


def operands(requires_grad: bool = False) -> tuple[Tensor, Tensor]:
    a, w = (torch.randn(*shape, dtype=torch.bfloat16).requires_grad_(requires_grad) for shape in ((ROWS, K), (len(OFFS), N, K)))
    return a, w


def groups() -> list[slice]:
    ends = [0, *OFFS.tolist()]
    return [slice(*pair) for pair in itertools.pairwise(ends)]


class Experts(nn.Module):
    def __init__(self, k: int = K, n: int = N) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(len(OFFS), n, k, dtype=torch.bfloat16))

    def forward(self, x: Tensor, offs: Tensor) -> Tensor:
        return F.grouped_mm(x, self.weight.transpose(-2, -1), offs=offs)


def rewritten(model: nn.Module, *inputs: Any, **options: Any) -> tuple[fx.GraphModule, fp8fx.Report]:
    capture = Capture(Config(**options))
    torch.compile(model, backend=capture)(*inputs)
    return capture.only.after, capture.only.report


@pytest.mark.parametrize("recipe", ["mixed", "rowwise"])
def test_each_expert_is_the_linear_of_its_weight(recipe: str) -> None:
    a, w = operands()
    y = grouped.op(recipe)(a, w.transpose(-2, -1), OFFS)
    for expert, rows in enumerate(groups()):
        alone = linear_op(recipe)(a[rows], w[expert].t())
        assert torch.equal(y[rows], alone), f"expert {expert}"


def test_global_scales_each_row_and_each_experts_weight() -> None:
    a, w = operands()
    assert torch.equal(grouped.op("global")(a, w.transpose(-2, -1), OFFS)[:34], grouped.op("mixed")(a, w.transpose(-2, -1), OFFS)[:34])


@recipes
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
def test_a_row_that_is_nobodys_touches_no_other(recipe: str, bad: float) -> None:
    a, w = operands()
    expected = grouped.op(recipe)(a, w.transpose(-2, -1), OFFS)[:34]
    a[34:] = bad
    assert torch.equal(grouped.op(recipe)(a, w.transpose(-2, -1), OFFS)[:34], expected)


@recipes
def test_gradients_are_those_of_high_precision(recipe: str) -> None:
    a, w = operands(requires_grad=True)
    grad = torch.randn(ROWS, N, dtype=torch.bfloat16)
    y, exact = grouped.op(recipe)(a, w.transpose(-2, -1), OFFS), F.grouped_mm(a, w.transpose(-2, -1), offs=OFFS)
    mine, theirs = (torch.autograd.grad(out, (a, w), grad) for out in (y, exact))
    assert torch.equal(mine[0][:34], theirs[0][:34])
    assert torch.equal(mine[1], theirs[1])
    assert mine[1].is_contiguous()


def test_a_gradient_of_a_weight_stored_in_by_out() -> None:
    a, w = operands(requires_grad=True)
    b = w.detach().transpose(-2, -1).contiguous().requires_grad_()
    mine = torch.autograd.grad(grouped.op("mixed")(a, b, OFFS).float().square().sum(), b)[0]
    other = torch.autograd.grad(grouped.op("mixed")(a, w.transpose(-2, -1), OFFS).float().square().sum(), w)[0]
    assert torch.equal(mine, other.transpose(-2, -1))
    assert mine.is_contiguous()


def test_a_gradient_is_not_differentiated_again() -> None:
    a, w = operands(requires_grad=True)
    loss = grouped.op("mixed")(a, w.transpose(-2, -1), OFFS).float().square().sum()
    (grad,) = torch.autograd.grad(loss, a, create_graph=True)
    with pytest.raises(DifferentiationError, match="grouped_mm_fp8_mixed"):
        grad.sum().backward()


def test_forward_mode_is_an_error_that_names_the_op() -> None:
    a, w = operands()
    with forward_ad.dual_level(), pytest.raises(DifferentiationError, match="grouped_mm_fp8_mixed was differentiated in forward mode"):
        grouped.op("mixed")(forward_ad.make_dual(a, a), w.transpose(-2, -1), OFFS)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a, b, offs: (a[0], b, offs), ShapeError, r"expected \(M, K\), \(E, K, N\)"),
        (lambda a, b, offs: (a, b, offs[:2]), ShapeError, r"offs \(2,\)"),
        (lambda a, b, offs: (a, b), ShapeError, r"and no offs; expected \(E, M, K\)"),
        (lambda a, b, offs: (a[:, :40], b[:, :40], offs), ShapeError, "multiples of 16"),
        (lambda a, b, offs: (a.float(), b, offs), DTypeError, "a of torch.float32; expected torch.bfloat16"),
        (lambda a, b, offs: (a, b, offs.long()), DTypeError, "offs of torch.int64"),
    ],
)
def test_bad_operands(change: Any, error: type[Exception], message: str) -> None:
    a, w = operands()
    with pytest.raises(error, match=message):
        grouped.op("mixed")(*change(a, w.transpose(-2, -1), OFFS))


def test_bad_executors() -> None:
    a, w = operands()
    with pytest.raises(ConfigError, match="simulated"):
        grouped.op("mixed")(a, w.transpose(-2, -1), OFFS, executor="simulate")
    with pytest.raises(ExecutorError):
        grouped.op("mixed")(a, w.transpose(-2, -1), OFFS, executor="scaled_mm")


@recipes
def test_a_grouped_matmul_becomes_the_op(recipe: str) -> None:
    model, x = Experts(), operands()[0]
    after, report = rewritten(model, x, OFFS, recipe=recipe)
    assert ops(after.graph)[grouped.op(recipe)] == 1
    assert torch._grouped_mm not in ops(after.graph)
    (row,) = report.rewritten
    assert (row.form, row.op, row.gemms, row.m, row.k, row.n) == (
        *("grouped_mm", f"grouped_mm_fp8_{recipe}", ("forward",)),
        *(str(ROWS), str(K), str(N)),
    )
    assert row.flops == 2 * ROWS * K * N
    (y,) = after(
        *[{"x": x, "offs": OFFS}.get(n.target.strip("L_").rstrip("_"), model.weight) for n in after.graph.find_nodes(op="placeholder")]
    )
    assert torch.equal(y[:34], grouped.op(recipe)(x, model.weight.transpose(-2, -1), OFFS)[:34])


@recipes
def test_it_compiles_and_trains_to_the_same_bits(recipe: str) -> None:
    model, x = Experts(), operands()[0]
    compiled = torch.compile(model, backend=fp8fx.Backend(Config(recipe=recipe)), fullgraph=True)
    found = []
    for call in (compiled, lambda x, offs: grouped.op(recipe)(x, model.weight.transpose(-2, -1), offs)):
        y = call(x, OFFS)[:34]
        found.append((y, *torch.autograd.grad(y.float().square().sum(), model.weight)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_an_exported_one_too() -> None:
    model, x = Experts(), operands()[0]
    gm = fp8fx.convert(torch.export.export(model, (x, OFFS)))
    assert torch.equal(gm(x, OFFS)[:34], grouped.op("mixed")(x, model.weight.transpose(-2, -1), OFFS)[:34])


@recipes
@torch.no_grad()
def test_a_frozen_weight_is_the_one_quantized_at_each_call(recipe: str) -> None:
    model, x = Experts(), operands()[0]
    expected = grouped.op(recipe)(x, model.weight.transpose(-2, -1), OFFS)[:34]
    gm = fp8fx.convert(torch.export.export(model, (x, OFFS)), recipe=recipe, freeze=True)
    assert torch.equal(gm(x, OFFS)[:34], expected)
    held = list(gm.state_dict().values())
    assert sorted(str(t.dtype) for t in held) == ["torch.float32", "torch.float8_e4m3fn"]
    compiled = torch.compile(model, backend=fp8fx.Backend(Config(recipe=recipe, freeze=True)))
    assert torch.equal(compiled(x, OFFS)[:34], expected)
    assert fp8fx.release(model) == 2 * model.weight.numel() * 3 // 4  # one of the four experts stays
    assert torch.equal(compiled(x, OFFS)[:34], expected)


@torch.no_grad()
def test_frozen_experts_take_new_weights() -> None:
    model, x = Experts(), operands()[0]
    gm = fp8fx.convert(torch.export.export(model, (x, OFFS)), freeze=True)
    model.weight.mul_(3)
    fp8fx.refresh(gm, model.state_dict())
    assert torch.equal(gm(x, OFFS)[:34], grouped.op("mixed")(x, model.weight.transpose(-2, -1), OFFS)[:34])


@recipes
def test_the_gradient_through_a_frozen_weight(recipe: str) -> None:
    a, w = operands()
    cast = RECIPES[recipe].forward.rhs  # type: ignore[union-attr]
    q = grouped.quantize_weights(w, cast, quantize)
    grad = torch.randn(ROWS, N, dtype=torch.bfloat16)
    (mine,) = torch.autograd.grad(grouped.op(recipe)(a.requires_grad_(), q.data.transpose(-2, -1), OFFS, b_scale=q.scale), a, grad)
    values = (q.data.float() * q.scale.unsqueeze(-1)).bfloat16()  # type: ignore[union-attr]
    (exact,) = torch.autograd.grad(F.grouped_mm(a, values.transpose(-2, -1), offs=OFFS), a, grad)
    assert torch.equal(mine[:34], exact[:34])


@pytest.mark.parametrize(
    "change", [lambda q: (q.data, q.scale[:, :1]), lambda q: (q.data.bfloat16(), q.scale), lambda q: (q.data, q.scale.half())]
)
def test_bad_frozen_weights(change: Any) -> None:
    a, w = operands()
    data, scale = change(grouped.quantize_weights(w, RECIPES["mixed"].forward.rhs, quantize))  # type: ignore[union-attr]
    with pytest.raises((ShapeError, DTypeError), match="grouped_mm_fp8_mixed got b"):
        grouped.op("mixed")(a, data.transpose(-2, -1), OFFS, b_scale=scale)


@torch.no_grad()
def test_frozen_experts_are_no_siblings() -> None:
    class Twice(Experts):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Parameter(torch.randn_like(self.weight))

        def forward(self, x: Tensor, offs: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x, offs), F.grouped_mm(x, self.other.mT, offs=offs)

    after, report = rewritten(Twice(), operands()[0], OFFS, freeze=True)
    assert ops(after.graph)[grouped.op("mixed")] == 2
    assert [row.remark for row in report.rewritten] == ["", ""]


@torch.no_grad()
def test_on_tensor_cores_auto_takes_frozen_experts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decide, "resolve", lambda executor, device, groups=False: ScaledMM())
    model, x = Experts(k=4096, n=4096), torch.randn(ROWS, 4096, dtype=torch.bfloat16)
    for frozen in (False, True):
        backend = fp8fx.Backend(Config(freeze=frozen))
        (row,) = backend.explain(model, x, OFFS).rows
        if frozen:
            assert row.remark.startswith("predicted: forward 1.")
        else:
            assert row.reason is not None and row.reason.startswith("FP8 is not worth it: the weights of all experts")
    (row,) = fp8fx.Backend(Config(profit="always")).explain(model, x, OFFS).rows
    assert row.reason is None


class Weighted(Experts):
    def forward(self, x: Tensor, offs: Tensor) -> Tensor:
        return F.grouped_mm(x, (self.weight * 2).transpose(-2, -1), offs=offs)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: Experts(k=40, n=48), "a weight for each of several experts, and K=40, N=48 not both multiples of 16"),
        (Weighted, "the weight is computed, not a parameter, a buffer, a constant or a view of one"),
    ],
)
def test_refusals(model: Any, reason: str) -> None:
    model = model()
    x = torch.randn(ROWS, model.weight.shape[-1], dtype=torch.bfloat16)
    with torch.no_grad():
        after, report = rewritten(model, x, OFFS)
    assert [row.reason for row in report.refused] == [reason]
    assert ops(after.graph)[torch._grouped_mm] == 1


def test_profit_never_and_exclude() -> None:
    for options, reason in (({"profit": "never"}, "profit='never'"), ({"exclude": ("weight",)}, "excluded by 'weight'")):
        _, report = rewritten(Experts(), operands()[0], OFFS, **options)
        assert [row.reason for row in report.refused] == [reason]


class Batched(Experts):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.transpose(-2, -1)


class BatchedByBmm(Experts):
    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.weight.mT)


@recipes
@pytest.mark.parametrize("kind", [Batched, BatchedByBmm])
@pytest.mark.parametrize("m", [7, 1, 0])
def test_a_batch_of_weights_is_a_grouped_matmul_of_equal_groups(recipe: str, kind: type[Experts], m: int) -> None:
    model, x = kind(), torch.randn(len(OFFS), m, K, dtype=torch.bfloat16)
    backend = fp8fx.Backend(Config(recipe=recipe))
    y = torch.compile(model, backend=backend, fullgraph=True)(x)
    (row,) = backend.reports[0].rewritten
    assert row.op == f"grouped_mm_fp8_{recipe}"
    offs = torch.arange(1, len(OFFS) + 1, dtype=torch.int32) * m
    expected = grouped.op(recipe)(x.reshape(-1, K), model.weight.transpose(-2, -1), offs)
    assert torch.equal(y, expected.view(len(OFFS), m, N))


@torch.no_grad()
def test_a_batch_runs_on_another_device_than_it_was_converted_on() -> None:
    model, x = Batched(), torch.randn(len(OFFS), 7, K, dtype=torch.bfloat16)
    expected, values = fp8fx.convert(fx.symbolic_trace(model), (x,))(x), copy.deepcopy(model.state_dict())
    gm = fp8fx.convert(fx.symbolic_trace(model.to("meta")), (x.to("meta"),))
    assert gm(x.to("meta")).device.type == "meta"
    gm.to_empty(device="cpu").load_state_dict(values)
    assert torch.equal(gm(x), expected)
    graph = fx.Tracer().trace(gm)  # as unpickling does
    assert torch.equal(fx.GraphModule(gm, graph)(x), expected)


def test_a_batch_of_any_size_is_one_compilation() -> None:
    model, backend = Batched(), fp8fx.Backend(Config())
    compiled = torch.compile(model, backend=backend, dynamic=True)
    for m in (5, 9, 33):
        x = torch.randn(len(OFFS), m, K, dtype=torch.bfloat16)
        assert torch.equal(
            compiled(x), grouped.op("mixed")(x.view(-1, K), model.weight.mT, OFFS.new_tensor([1, 2, 3, 4]) * m).view(4, m, N)
        )
    assert len(backend.reports) == 1


def test_a_batch_under_autocast() -> None:
    model, x = Batched().float(), torch.randn(len(OFFS), 7, K)
    backend = fp8fx.Backend(Config())
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.compile(model, backend=backend)(x)
    assert len(backend.reports[0].rewritten) == 1
    expected = grouped.op("mixed")(x.bfloat16().view(-1, K), model.weight.bfloat16().mT, OFFS.new_tensor([7, 14, 21, 28]))
    assert torch.equal(y, expected.view(4, 7, N))


@recipes
@torch.no_grad()
def test_a_frozen_batch_under_autocast_is_the_one_quantized_at_each_call(recipe: str) -> None:
    model, x, found = Batched().float(), torch.randn(len(OFFS), 7, K), []
    for freeze in (False, True):
        capture = Capture(Config(recipe=recipe, freeze=freeze))
        with torch.autocast("cpu", torch.bfloat16):
            found.append(torch.compile(model, backend=capture)(x))
        (row,) = capture.only.report.rewritten
        assert row.remark == ""
        held = [p.dtype for name, p in capture.only.after.named_parameters() if "fp8" in name]
        assert held == [torch.float8_e4m3fn] * freeze
    assert found[0].dtype == found[1].dtype == torch.bfloat16
    assert torch.equal(*found)


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("kind", [Batched, BatchedByBmm])
@torch.no_grad()
def test_a_batch_that_autocast_makes_another_dtype_is_multiplied_in_that(kind: type[Experts], freeze: bool) -> None:
    model, x = kind(), torch.randn(len(OFFS), 7, K, dtype=torch.bfloat16)
    w = model.weight
    if freeze:
        q = grouped.quantize_weights(w, RECIPES["mixed"].forward.rhs, quantize)  # type: ignore[union-attr]
        w = q.data.float() * q.scale.unsqueeze(-1)  # type: ignore[union-attr]
    gm = fp8fx.convert(model, (x,), freeze=freeze)
    assert len(gm.meta["fp8fx_report"].rewritten) == 1
    for value in (x, x.float()):
        with torch.autocast("cpu", torch.float16):
            y = gm(value)
        assert y.dtype == torch.float16
        assert torch.equal(y, value.half() @ w.half().mT)


def test_the_gradient_of_a_batch_in_another_dtype() -> None:
    model, x = Batched(), torch.randn(len(OFFS), 7, K, dtype=torch.bfloat16)
    gm, found = fp8fx.convert(model, (x,)), []
    for call in (model, gm):
        with torch.autocast("cpu", torch.float16):
            y = call(x)
        found.append(torch.autograd.grad(y.float().square().sum(), model.weight)[0])
    assert torch.equal(*found)


def test_bad_operands_of_a_batch_in_another_dtype() -> None:
    a, b = torch.randn(4, 8, 32), torch.randn(4, 32, 64)
    for bad, error, message in (
        ((a, b.bfloat16()), DTypeError, "got a torch.float32 and b torch.bfloat16; expected the same dtype"),
        ((a, b[:, :16]), ShapeError, "expected .E, M, K. and .E, K, N."),
    ):
        with pytest.raises(error, match=message):
            grouped.op("mixed")(*bad)
    with pytest.raises(ConfigError, match="executor"):
        grouped.op("mixed")(a, b, executor="nonsense")


def test_a_batch_in_float32_is_left() -> None:
    _, report = rewritten(Batched().float(), torch.randn(len(OFFS), 7, K))
    assert [row.reason for row in report.refused] == ["a weight for each of several experts, and not in bfloat16"]


def two_parts(w: Tensor) -> tuple[Tensor, Tensor]:
    return w[:2], w[2:]


@torch.no_grad()
def test_parts_of_a_released_weight_are_not_one_another() -> None:
    class Parts(Experts):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            first, second = two_parts(self.weight)
            return torch.bmm(x, first.mT), torch.bmm(x.relu(), second.mT)

    model, x = Parts(), torch.randn(2, 7, K, dtype=torch.bfloat16)
    compiled = torch.compile(model, backend=fp8fx.Backend(Config(freeze=True)))
    expected = compiled(x)
    fp8fx.release(model)
    assert all(map(torch.equal, compiled(x), expected))


def test_a_batch_of_another_size_than_traced_is_what_it_is_for_matmul() -> None:
    model = Batched()
    gm = fp8fx.convert(fx.symbolic_trace(model), (torch.randn(4, 8, K, dtype=torch.bfloat16),))
    x = torch.randn(1, 8, K, dtype=torch.bfloat16)
    assert gm(x).shape == model(x).shape == (4, 8, N)
    with pytest.raises(ShapeError, match=r"expected \(E, M, K\) and \(E, K, N\)"):
        gm(torch.randn(2, 8, K, dtype=torch.bfloat16))


ROOMS: dict[str, Any] = {
    "as usual": lambda *shape: torch.randn(shape, dtype=torch.bfloat16),
    "the first dimension last": lambda e, *rest: torch.randn(*rest, e, dtype=torch.bfloat16).permute(2, 0, 1),
    "the first two swapped": lambda e, m, k: torch.randn(m, e, k, dtype=torch.bfloat16).transpose(0, 1),
    "the last two swapped": lambda e, m, k: torch.randn(e, k, m, dtype=torch.bfloat16).mT,
    "the last first": lambda e, m, k: torch.randn(k, e, m, dtype=torch.bfloat16).permute(1, 2, 0),
}


@recipes
@pytest.mark.parametrize("of_w", ROOMS)
@pytest.mark.parametrize("of_x", ROOMS)
def test_any_layout(recipe: str, of_x: str, of_w: str) -> None:
    x, w = ROOMS[of_x](4, 7, K), ROOMS[of_w](4, N, K)
    offs = OFFS.new_tensor([7, 14, 21, 28])
    expected = grouped.op(recipe)(x.contiguous().view(28, K), w.contiguous().mT, offs)
    assert torch.equal(grouped.op(recipe)(x.reshape(28, K), w.mT, offs), expected)


LAYOUTS: dict[str, Any] = {
    "x, strided": (lambda: torch.randn(4, 7, K + 1, dtype=torch.bfloat16)[:, :, :K], lambda: torch.randn(4, K, N, dtype=torch.bfloat16)),
    "x, expanded": (lambda: torch.randn(K, dtype=torch.bfloat16).expand(4, 7, K), lambda: torch.randn(4, K, N, dtype=torch.bfloat16)),
    "w, permuted": (
        lambda: torch.randn(4, 7, K, dtype=torch.bfloat16),
        lambda: torch.randn(K, N, 4, dtype=torch.bfloat16).permute(2, 0, 1),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_any_layout(layout: str) -> None:
    x, w = (make().requires_grad_() for make in LAYOUTS[layout])
    offs = OFFS.new_tensor([7, 14, 21, 28])
    y, exact = grouped.op("mixed")(x.reshape(28, K), w, offs).view(4, 7, N), torch.bmm(x, w)
    grad = torch.randn_like(exact)
    for mine, theirs in zip(*(torch.autograd.grad(out, (x, w), grad) for out in (y, exact)), strict=True):
        assert (mine.float() - theirs.float()).norm() < 0.01 * theirs.float().norm()


def test_autocast_leaves_a_grouped_matmul_alone() -> None:
    a, w = operands()
    with torch.autocast("cpu", torch.float16):
        y = grouped.op("mixed")(a, w.transpose(-2, -1), OFFS)
        empty = grouped.op("mixed")(a[:0], w.transpose(-2, -1), OFFS * 0)
    assert y.dtype == empty.dtype == torch.bfloat16
    assert torch.equal(y[:34], grouped.op("mixed")(a, w.transpose(-2, -1), OFFS)[:34])


def test_a_weight_expanded_over_a_batch_is_no_experts() -> None:
    class Expanded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(K, N, dtype=torch.bfloat16))

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(x, self.weight.expand(4, K, N))

    _, report = rewritten(Expanded(), torch.randn(4, 7, K, dtype=torch.bfloat16))
    assert [row.reason for row in report.refused] == ["the weight is expanded over a batch"]


@torch.no_grad()
def test_experts_in_a_matrix_are_not_released() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4 * N, K, dtype=torch.bfloat16))

        def forward(self, x: Tensor, offs: Tensor) -> Tensor:
            return F.grouped_mm(x, self.weight.view(4, N, K).mT, offs=offs)

    model, x = Flat(), operands()[0]
    compiled = torch.compile(model, backend=fp8fx.Backend(Config(freeze=True)))
    expected = compiled(x, OFFS)[:34]
    assert fp8fx.release(model) == 0
    assert torch.equal(compiled(x, OFFS)[:34], expected)


@torch.no_grad()
def test_experts_stored_in_another_order_are_not_released() -> None:
    class Swapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(N, 4, K, dtype=torch.bfloat16))

        def forward(self, x: Tensor, offs: Tensor) -> Tensor:
            return F.grouped_mm(x, self.weight.transpose(0, 1).mT, offs=offs)

    model, x = Swapped(), operands()[0]
    compiled = torch.compile(model, backend=Lowered(Config(freeze=True)), fullgraph=True)
    expected = compiled(x, OFFS)[:34]
    assert fp8fx.release(model) == 0
    assert torch.equal(compiled(x, OFFS)[:34], expected)


@torch.no_grad()
def test_a_device_without_grouped_tensor_cores_is_not_asked_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decide, "resolve", lambda executor, device, groups=False: Simulated() if groups else ScaledMM())
    for options in ({}, {"freeze": True}):
        (row,) = fp8fx.Backend(Config(**options)).explain(Experts(), operands()[0], OFFS).rows
        assert row.reason == "FP8 is not worth it: tensor cores multiply groups in FP8 on compute capability 9.0 alone"
