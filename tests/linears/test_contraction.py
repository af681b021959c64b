"""An einsum or tensordot as a matmul between views: the values and the memory layout of torch's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fp8fx.convert import convert
from fp8fx.linears.einsum import Contraction, einsum, tensordot
from fp8fx.linears.views import Views, apply, laid_out
from fp8fx.recipes.quantize import sqnr

B, S, D, H, K, N = 2, 3, 8, 2, 4, 5
SIZES = {"b": B, "s": S, "d": D, "h": H, "k": K, "n": N}


def tensors(equation: str, leading: tuple[int, ...] = (B, S)) -> list[Tensor]:
    terms = equation.replace(" ", "").split("->")[0].split(",")
    sizes = [[[SIZES[label] for label in part] for part in term.split("...")] for term in terms]
    return [torch.randn(*parts[0], *(n for part in parts[1:] for n in (*leading, *part))) for parts in sizes]


def check(found: Contraction, operands: list[Tensor], at: int, expected: Tensor) -> None:
    views = found.views(operands, at)
    assert not isinstance(views, str), views

    def product(*output: tuple[object, ...]) -> Tensor:
        return apply(apply(operands[1 - at], views.input) @ apply(operands[at], views.weight), output)

    y = product(*laid_out(views, product(*views.output), expected).output)
    torch.testing.assert_close(y, expected)
    assert y.stride() == expected.stride()
    m, k, n = found.sizes(operands)
    assert m * k * n == apply(operands[1 - at], views.input).numel() * apply(operands[at], views.weight).shape[1]


@pytest.mark.parametrize(
    ("equation", "at"),
    [
        ("bsd,dn->bsn", 1),
        ("bsd, nd -> bsn", 1),
        ("bsd,nd->nsb", 1),
        ("bsd,dhk->bshk", 1),
        ("bsd,dhk->bhsk", 1),
        ("dhk,bsd->bshk", 0),
        ("dhk,bsd->hkbs", 0),
        ("bshk,hkd->bsd", 1),
        ("bhsk,hkd->bsd", 1),
        ("hkd,bshk->dbs", 0),
        ("...d,dn->...n", 1),
        ("...d,dhk", 1),
        ("nd,...d", 0),
        ("d...,dn->n...", 1),
        ("bsd,d->bs", 1),
        ("d,dn->n", 1),
        ("nd,d", 0),
        ("bsd,sdn->bn", 1),
        ("bsd,bsd->", 1),
    ],
)
def test_einsum(equation: str, at: int) -> None:
    operands = tensors(equation)
    check(einsum(equation, [x.dim() for x in operands]), operands, at, torch.einsum(equation, *operands))


@pytest.mark.parametrize("leading", [(), (3,), (2, 3, 2)], ids=str)
def test_an_ellipsis_of_any_length(leading: tuple[int, ...]) -> None:
    operands = tensors("...d,dn", leading)
    check(einsum("...d,dn", [x.dim() for x in operands]), operands, 1, torch.einsum("...d,dn", *operands))


@pytest.mark.parametrize(
    ("shapes", "dims", "at"),
    [
        (((B, S, D), (D, N)), 1, 1),
        (((B, S, D), (S, D, N)), 2, 1),
        (((B, S, D), (N, D)), ([2], [1]), 1),
        (((B, S, D), (N, D, S)), ([2, 1], [1, -1]), 1),
        (((N, S, D), (B, S, D)), ([1, 2], [1, 2]), 0),
        (((D, N), (B, D)), ([0], [-1]), 0),
    ],
    ids=str,
)
def test_tensordot(shapes: tuple[tuple[int, ...], ...], dims: int | tuple[list[int], list[int]], at: int) -> None:
    operands = [torch.randn(shape) for shape in shapes]
    check(tensordot(dims, [x.dim() for x in operands]), operands, at, torch.tensordot(*operands, dims))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("equation", "reason"),
    [
        ("bsd,bdn->bsn", "the weight is batched"),
        ("bsd,dhk->bsd", "the weight is batched"),
        ("bsd,dd->bs", "a diagonal is taken"),
        ("bbd,dn->bn", "a diagonal is taken"),
        ("bsd,dn->bn", "a dimension is summed that only one operand has"),
        ("bsd,hk->bsdhk", "nothing is contracted"),
    ],
)
def test_what_is_no_matmul(equation: str, reason: str) -> None:
    operands = tensors(equation)
    found = einsum(equation, [x.dim() for x in operands])
    assert str(found.views(operands, 1)) == reason
    assert found.contracts == (equation not in ("bsd,hk->bsdhk", "bsd,dhk->bsd"))


def test_a_dimension_of_size_one_is_broadcast() -> None:
    operands = [torch.randn(3, 1), torch.randn(8, 5)]
    assert str(einsum("ij,jk->ik", [2, 2]).views(operands, 1)) == "a dimension of size 1 is broadcast"


def test_an_input_of_size_one_is_broadcast_later() -> None:
    traced, w = torch.randn(3, 2, 4), torch.randn(2, 4, 5)
    views = einsum("bhd,hdn->bn", [3, 3]).views([traced, w], 1)
    assert isinstance(views, Views)
    for shape in ((6, 1, 4), (6, 2, 1), (6, 1, 1)):
        x = torch.randn(shape)
        torch.testing.assert_close(apply(x, views.input) @ apply(w, views.weight), torch.einsum("bhd,hdn->bn", x, w))
    with pytest.raises(RuntimeError, match="expand"):
        apply(torch.randn(6, 4, 2), views.input)  # as many values, and no einsum


@pytest.mark.parametrize(
    ("equation", "traced", "weight", "called"),
    [
        ("bhd,hdn->bn", (3, 1, 4), (1, 4, 5), (3, 2, 4)),
        ("bhd,hdn->bn", (3, 4, 1), (4, 1, 5), (3, 1, 6)),
        ("bhd,hdn->bn", (3, 1, 4), (1, 4, 5), (0, 3, 4)),
    ],
)
def test_an_input_of_more_is_summed_later_against_a_weight_of_size_one(
    equation: str, traced: tuple[int, ...], weight: tuple[int, ...], called: tuple[int, ...]
) -> None:
    w = torch.randn(weight)
    views = einsum(equation, [len(traced), len(weight)]).views([torch.randn(traced), w], 1)
    assert isinstance(views, Views)
    for shape in (traced, called):
        x = torch.randn(shape)
        torch.testing.assert_close(apply(x, views.input) @ apply(w, views.weight), torch.einsum(equation, x, w))


@pytest.mark.parametrize(
    ("shapes", "at"), [(((3, 1), (1, 5)), 1), (((3, 1, 1), (1, 1, 5)), 1), (((5, 1), (3, 1)), 0)], ids=str
)
def test_a_contracted_size_of_one_is_a_pointwise_product(shapes: tuple[tuple[int, ...], ...], at: int) -> None:
    equation = {2: "bd,dn->bn", 3: "bhd,hdn->bn"}[len(shapes[0])] if at else "nd,bd->bn"
    operands = [torch.randn(shape) for shape in shapes]
    assert str(einsum(equation, list(map(len, shapes))).views(operands, at)) == "what is contracted has size 1"
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.einsum(equation, operands).dtype == torch.float32


@pytest.mark.parametrize("equation", ["ij,jk,kl->il", "ijk,kl->ijl", "i,jk->ik"])
def test_an_equation_that_does_not_fit(equation: str) -> None:
    with pytest.raises(ValueError, match=r"dimensions|shorter|longer"):
        einsum(equation, [2, 2])


def test_dimensions_of_size_one_lie_where_torch_puts_them() -> None:
    x, w = torch.randn(1, 9, 9, 70), torch.randn(16, 70)
    expected = w @ x.mT
    views = laid_out(Views((("transpose", -1, -2),), (("t",),), (("transpose", -1, -2),)), (x @ w.t()).mT, expected)
    y = apply(x @ w.t(), views.output)
    torch.testing.assert_close(y, expected)
    assert y.stride() == expected.stride()


@pytest.mark.parametrize(
    ("written", "traced", "called"),
    [
        (lambda w, x: torch.einsum("bsd,hkd->bhsk", x, w), (2, 1, 32), (2, 6, 32)),
        (lambda w, x: torch.einsum("bsd,hkd->bhsk", x, w), (1, 6, 32), (3, 6, 32)),
        (lambda w, x: torch.tensordot(w, x, ([2], [1])), (1, 32), (6, 32)),
        (lambda w, x: F.conv2d(x, w[0, :, :, None, None]), (2, 32, 1, 1), (2, 32, 5, 7)),
        (lambda w, x: w[0] @ x.mT, (1, 32), (5, 32)),
        (lambda w, x: torch.einsum("bshd,hdo->bso", x, w[:1]), (2, 3, 1, 16), (2, 3, 4, 16)),
        (lambda w, x: torch.einsum("ohd,bshd->bso", w[:, :, :1], x), (2, 3, 16, 1), (2, 3, 16, 5)),
        (lambda w, x: torch.tensordot(x, w[:1, :1], ([1, 2, 3], [0, 1, 2])), (6, 1, 1, 32), (6, 2, 3, 32)),
    ],
)
def test_a_size_that_was_1_in_the_traced_call_may_be_another(
    written: Callable[[Tensor, Tensor], Tensor], traced: tuple[int, ...], called: tuple[int, ...]
) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 16, 32))

        def forward(self, x: Tensor) -> Tensor:
            return written(self.w, x)

    model = Model()
    gm = convert(fx.symbolic_trace(model), (torch.randn(traced),), convolutions=True)
    assert len(gm.meta["fp8fx_report"].rewritten) == 1
    for shape in (traced, called):
        x = torch.randn(shape)
        out, expected = gm(x), model(x)
        assert out.shape == expected.shape
        assert sqnr(expected, out) > 20
