"""The grouped ops against experts multiplied one by one: values, gradients, layouts, errors, frozen weights."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

import fp8fx
from fp8fx.errors import ConfigError, DifferentiationError, DTypeError, ExecutorError, ShapeError
from fp8fx.ops import grouped_mm as grouped
from fp8fx.ops.matmul import op as linear_op
from fp8fx.recipes.quantize import quantize, quantize_experts
from fp8fx.recipes.recipe import RECIPES
from tests.support.experts import OFFS, ROWS, Batched, K, N, operands, recipes


def groups() -> list[slice]:
    ends = [0, *OFFS.tolist()]
    return [slice(*pair) for pair in itertools.pairwise(ends)]


@pytest.mark.parametrize("recipe", ["mixed", "rowwise"])
def test_each_expert_is_the_linear_of_its_weight(recipe: str) -> None:
    a, w = operands()
    y = grouped.op(recipe)(a, w.transpose(-2, -1), OFFS)
    for expert, rows in enumerate(groups()):
        alone = linear_op(recipe)(a[rows], w[expert].t())
        assert torch.equal(y[rows], alone), f"expert {expert}"


def test_global_scales_each_row_and_each_experts_weight() -> None:
    a, w = operands()
    assert torch.equal(
        grouped.op("global")(a, w.transpose(-2, -1), OFFS)[:34], grouped.op("mixed")(a, w.transpose(-2, -1), OFFS)[:34]
    )


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
    with (
        forward_ad.dual_level(),
        pytest.raises(DifferentiationError, match="grouped_mm_fp8_mixed was differentiated in forward mode"),
    ):
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
def test_the_gradient_through_a_frozen_weight(recipe: str) -> None:
    a, w = operands()
    cast = RECIPES[recipe].forward.rhs  # type: ignore[union-attr]
    q = quantize_experts(w, cast, quantize)
    grad = torch.randn(ROWS, N, dtype=torch.bfloat16)
    (mine,) = torch.autograd.grad(
        grouped.op(recipe)(a.requires_grad_(), q.data.transpose(-2, -1), OFFS, b_scale=q.scale), a, grad
    )
    values = (q.data.float() * q.scale.unsqueeze(-1)).bfloat16()  # type: ignore[union-attr]
    (exact,) = torch.autograd.grad(F.grouped_mm(a, values.transpose(-2, -1), offs=OFFS), a, grad)
    assert torch.equal(mine[:34], exact[:34])


@pytest.mark.parametrize(
    "change",
    [lambda q: (q.data, q.scale[:, :1]), lambda q: (q.data.bfloat16(), q.scale), lambda q: (q.data, q.scale.half())],
)
def test_bad_frozen_weights(change: Any) -> None:
    a, w = operands()
    data, scale = change(quantize_experts(w, RECIPES["mixed"].forward.rhs, quantize))  # type: ignore[union-attr]
    with pytest.raises((ShapeError, DTypeError), match="grouped_mm_fp8_mixed got b"):
        grouped.op("mixed")(a, data.transpose(-2, -1), OFFS, b_scale=scale)


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
    "x, strided": (
        lambda: torch.randn(4, 7, K + 1, dtype=torch.bfloat16)[:, :, :K],
        lambda: torch.randn(4, K, N, dtype=torch.bfloat16),
    ),
    "x, expanded": (
        lambda: torch.randn(K, dtype=torch.bfloat16).expand(4, 7, K),
        lambda: torch.randn(4, K, N, dtype=torch.bfloat16),
    ),
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
