"""Ways to write a linear as source text, and the same by hand with `mm(a, b, bias=None)`; for the property tests and
the fuzzer.

A template's `{x}` is the input (*, K), `{w}` a weight (N, K), `{v}` one (K, N), `{b}` a bias (N,), `{c}` an addend of
the result's shape, `{k}` and `{n}` the sizes. Of several experts, `{e}` of them, `{w}` is (E, N, K), `{v}` (E, K, N)
and `{o}` where the rows of each end, by hand mm's `offs`. Where a template is its own `by_hand`, the linear is left
alone.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fp8fx.ops import grouped_mm as grouped
from fp8fx.ops.matmul import op
from fp8fx.recipes.formats import block_size

__all__ = ["ANY", "EXPERTS", "EXPERT_PLACES", "NAMES", "PLACES", "WAYS", "Place", "Way", "exact", "fp8", "same"]

ANY = (1, 2, 3, 4)


@dataclass(frozen=True)
class Way:
    """One way to write a linear.

    Attributes:
        written: the template.
        by_hand: the same with `mm`.
        dims: how many dimensions the input may have.
        rows: how many matmuls the report shows.
    """

    written: str
    by_hand: str
    dims: tuple[int, ...] = ANY
    rows: int = 1

    @property
    def rewritten(self) -> bool:
        return "mm(" in self.by_hand and self.by_hand != self.written

    def fits(self, k: int, n: int) -> bool:
        """Whether one of these sizes is rewritten; a dimension of size 1 einsum and tensordot broadcast."""
        return self.rewritten and n > 0 and k > any(name in self.written for name in ("einsum", "tensordot", "inner"))


def _plain(written: str, *dims: int) -> Way:
    return Way(written, "mm({x}, {w}.t())" if "{w}" in written else "mm({x}, {v})", dims or ANY)


def _biased(written: str, *dims: int) -> Way:
    return Way(written, "mm({x}, {w}.t(), bias={b})" if "{w}" in written else "mm({x}, {v}, bias={b})", dims or ANY)


def _contracted(written: str, *dims: int) -> Way:
    """Where an input of size 1 is broadcast."""
    hand = _plain(written).by_hand.replace("{x}", "{x}.expand(*{x}.shape[:-1], {k})")
    return Way(written, hand, dims or ANY)


def _refused(written: str, *dims: int) -> Way:
    return Way(written, written, dims or ANY)


WAYS: tuple[Way, ...] = (
    _plain("F.linear({x}, {w})"),
    _plain("F.linear({x}, weight={w}, bias=None)"),
    _biased("F.linear({x}, {w}, {b})"),
    _biased("F.linear(bias={b}, weight={w}, input={x})"),
    _biased("aten.linear.default({x}, {w}, {b})"),
    Way("F.linear({x}, {w}, {b} * 2)", "mm({x}, {w}.t(), bias={b} * 2)"),
    _plain("{x} @ {v}"),
    _plain("torch.matmul({x}, {v})"),
    _plain("torch.matmul({x}, other={v})"),
    _plain("{x}.matmul({v})"),
    _plain("{x}.__matmul__({v})"),
    _plain("{v}.__rmatmul__({x})"),
    _plain("operator.imatmul({x}, {v})"),
    _plain("torch.linalg.matmul({x}, {v})"),
    _plain("aten.linalg_matmul.default({x}, {v})"),
    _plain("aten.matmul.default({x}, {v})"),
    _plain("torch.matmul({x}, {v}.unsqueeze(0))", 3),
    _plain("torch.mm({x}, {v})", 2),
    _plain("{x}.mm({v})", 2),
    _plain("aten.mm.default({x}, {v})", 2),
    _biased("torch.addmm({b}, {x}, {v})", 2),
    _biased("torch.addmm(input={b}, mat1={x}, mat2={v}, alpha=1, beta=1)", 2),
    _biased("{b}.addmm({x}, {v})", 2),
    _biased("aten.addmm.default({b}, {x}, {v})", 2),
    _plain("torch.addmm({b}, {x}, {v}, beta=0)", 2),
    Way("torch.addmm({b}, {x}, {v}, beta=0.5, alpha=2)", "torch.add(mm({x}, {v}) * 2, {b}, alpha=0.5)", (2,)),
    Way("torch.addmm({c}, {x}, {v})", "mm({x}, {v}) + {c}", (2,)),
    Way("{c}.addmm({x}, {v}, beta=-1.5, alpha=0.25)", "torch.add(mm({x}, {v}) * 0.25, {c}, alpha=-1.5)", (2,)),
    Way("torch.addmm({c}[:, :1], {x}, {v}, alpha=3)", "mm({x}, {v}) * 3 + {c}[:, :1]", (2,)),
    # The weight on the left: (*, N, M).
    Way("{w} @ {x}.mT", "mm({x}, {w}.t()).mT.contiguous()", (2, 3, 4)),
    Way("torch.matmul({w}, {x}.transpose(-1, -2))", "mm({x}, {w}.t()).mT.contiguous()", (2, 3, 4)),
    Way("torch.mm({w}, {x}.t())", "mm({x}, {w}.t()).t().contiguous()", (2,)),
    _plain("{w} @ {x}", 1),
    Way("torch.mv({w}, {x})", "uncast(mm({x}, {w}.t()), {x})", (1,)),
    Way("{w}.mv({x})", "uncast(mm({x}, {w}.t()), {x})", (1,)),
    Way("{v}.t().mv(vec={x})", "uncast(mm({x}, {v}), {x})", (1,)),
    Way("torch.addmv({b}, {w}, {x})", "uncast(mm({x}, {w}.t(), bias={b}), {x})", (1,)),
    Way("{b}.addmv(vec={x}, mat={w})", "uncast(mm({x}, {w}.t(), bias={b}), {x})", (1,)),
    Way("torch.addmv({b}, {w}, {x}, beta=0.5, alpha=2)", "plus(uncast(mm({x}, {w}.t()), {x}) * 2, {b}, 0.5)", (1,)),
    # einsum, tensordot and inner.
    _contracted("torch.einsum('...k,kn->...n', {x}, {v})"),
    _contracted("torch.einsum('...k,nk', {x}, {w})"),
    _contracted("torch.einsum('ij,nj->in', [{x}, {w}])", 2),
    _contracted("torch.einsum('nk,bsk->bsn', {w}, {x})", 3),
    Way(
        "torch.einsum('bsk,nk->nbs', {x}, {w})",
        "mm({x}.expand(-1, -1, {k}), {w}.t()).permute(2, 0, 1).contiguous()",
        (3,),
    ),
    Way(
        "torch.einsum('bsk,khd->bhsd', {x}, {v}.unflatten(1, (-1, 1)))",
        "mm({x}.expand(-1, -1, {k}), {v}).unflatten(-1, (-1, 1)).permute(0, 2, 1, 3)",
        (3,),
    ),
    _contracted("torch.tensordot({x}, {v}, 1)"),
    _contracted("torch.tensordot({x}, {w}, dims=([-1], [1]))"),
    _contracted("torch.inner({x}, {w})"),
    _contracted("{x}.inner(other={v}.t())"),
    Way("aten.inner.default({w}, {x})", "mm({x}.expand(-1, -1, {k}), {w}.t()).permute(2, 0, 1).contiguous()", (3,)),
    # Convolutions of size 1: (B, N, ...).
    Way("F.conv1d({x}.mT, {w}.unsqueeze(-1), {b})", "mm({x}, {w}.t(), bias={b}).mT", (3,)),
    Way("F.conv2d({x}.movedim(-1, 1), {w}[:, :, None, None])", "mm({x}, {w}.t()).movedim(-1, 1)", (4,)),
    # Left alone.
    _refused("F.linear({x}, {w} * 2)"),
    _refused("{x} @ torch.cat([{v}, {v}], 1)"),
    _refused("F.linear({x}.double(), {w}.double())"),
    _refused("{x} @ {x}.mT", 2, 3, 4),
    _refused("torch.einsum('...ik,...jk->...ij', {x}, {x})", 2, 3, 4),
    _refused("torch.baddbmm({x}[:, :1].expand(3, -1, {n}), {x}.expand(3, -1, -1), {v}.expand(3, {k}, {n}))", 2),
    _refused("F.linear({w}, {x})", 2),
    _refused("({c} + 1).addmm_({x}, {v})", 2),
    _refused("torch.addbmm({c}, {x}[None], {v}[None])", 2),
    _refused("torch.linalg.multi_dot([{x}, {v}, {w}])", 2),
    _refused("torch.rnn_tanh_cell({x}, {x}[:, :1].expand(-1, {n}), {w}, {w}[:, :1].expand({n}, {n}))", 2),
)


def _batched(written: str) -> Way:
    """A batch of experts: groups of equally many rows."""
    each = "torch.arange(1, {e} + 1, dtype=torch.int32) * {x}.shape[1]"
    return Way(written, f"mm({{x}}.reshape(-1, {{k}}), {{v}}, offs={each}).view(*{{x}}.shape[:2], {{n}})", (3,))


EXPERTS: tuple[Way, ...] = (
    *(
        Way(written, "mm({x}, {v}, offs={o})", (2,))
        for written in (
            "F.grouped_mm({x}, {v}, offs={o})",
            "F.grouped_mm(mat_a={x}, mat_b={v}, offs={o}, bias=None)",
            "torch._grouped_mm({x}, {v}, {o})",
            "aten._grouped_mm.default({x}, {v}, {o})",
        )
    ),
    *map(
        _batched,
        (
            "{x} @ {v}",
            "torch.matmul({x}, {v})",
            "torch.bmm({x}, {v})",
            "{x}.bmm(mat2={v})",
            "aten.bmm.default({x}, {v})",
        ),
    ),
    # Left alone.
    _refused("F.grouped_mm({x}, {v} * 2, offs={o})", 2),
    _refused("torch._grouped_mm({x}, {v}, offs={o}, out_dtype={x}.dtype)", 2),
    _refused("torch.bmm({x}, {v}[torch.arange({e})])", 3),
    _refused("torch.baddbmm({x}[..., :1], {x}, {v})", 3),
    _refused("torch.einsum('emk,enk->emn', {x}, {w})", 3),
)
"""Ways to multiply rows of several experts by a weight of each; in bfloat16, with K and N that are multiples of 16."""


@dataclass(frozen=True)
class Place:
    """Where a weight (N, K), or one of each expert (E, N, K), is: what is registered and how it is seen; of
    `transposed` ones (K, N).

    Attributes:
        shape: of what is registered, a template of `{n}`, `{k}` and `{e}`.
        view: of `{p}`, what is registered.
        transposed: whether what is seen is (K, N).
    """

    shape: str
    view: str = "{p}"
    transposed: bool = False


PLACES: tuple[Place, ...] = (
    Place("{n}, {k}"),
    Place("{k}, {n}", transposed=True),
    Place("{k}, {n}", "{p}.T"),
    Place("{n}, {k}", "{p}.mT", True),
    Place("{n}, {k}", "torch.transpose({p}, -1, -2)", True),
    Place("{k}, {n}", "{p}.permute(1, 0)"),
    Place("{k}, {n}", "{p}.t().contiguous()"),
    Place("3 * {n}, {k}", "{p}[:{n}]"),
    Place("3 * {n}, {k}", "{p}.narrow(0, {n}, {n})"),
    Place("3 * {n}, {k}", "{p}.chunk(3)[1]"),
    Place("2 * {n}, {k}", "{p}.split({n})[1]"),
    Place("2 * {n}, {k}", "{p}[::2]"),
    Place("{n}, 2 * {k}", "{p}[:, ::2]"),
    Place("{n}, {k} + 3", "{p}[:, 3:]"),
    Place("{k}, 2 * {n}", "{p}[:, 1::2]", True),
    Place("{n} * {k}", "{p}.view({n}, {k})"),
    Place("{n} * {k}", "{p}.unflatten(0, ({k}, {n}))", True),
    Place("4, {n}, {k}", "{p}[2]"),
    Place("4, {k}, {n}", "{p}.select(0, 1)", True),
    Place("2, {n}, {k}", "{p}.unbind(0)[1]"),
    Place("{n}, {k}, 2", "{p}[..., 1]"),
    Place("{n}, 1, {k}", "{p}.squeeze(1)"),
    Place("{n}, 1", "{p}.expand({n}, {k})"),
    Place("{k}", "{p}.expand({n}, {k})"),
    Place("{n}, {k}", "{p}.detach()"),
    Place("2 * {n}, {k}", "{p}[torch.arange({n})]"),
    Place("2 * {n}, {k}", "{p}.index_select(0, torch.arange({n}))"),
)

EXPERT_PLACES: tuple[Place, ...] = (
    Place("{e}, {n}, {k}"),
    Place("{e}, {k}, {n}", transposed=True),
    Place("{e}, {n}, {k}", "{p}.mT", True),
    Place("{e}, {k}, {n}", "{p}.transpose(1, 2).contiguous()"),
    Place("{e} * {n}, {k}", "{p}.view({e}, {n}, {k})"),
    Place("{e} * {k}, {n}", "{p}.unflatten(0, ({e}, {k}))", True),
    Place("{n}, {e}, {k}", "{p}.transpose(0, 1)"),
    Place("2 * {e}, {n}, {k}", "{p}[{e}:]"),
    Place("2 * {e}, {n}, {k}", "{p}[::2]"),
    Place("{e}, 2 * {n}, {k}", "{p}[:, {n}:]"),
    Place("{e}, 2 * {n}, {k}", "{p}.chunk(2, 1)[0]"),
    Place("{e}, {k}, 2 * {n}", "{p}[..., ::2]", True),
    Place("2, {e}, {n}, {k}", "{p}.unbind(0)[1]"),
    Place("{n}, {k}, {e}", "{p}.permute(2, 0, 1)"),
    Place("{e}, {n}, {k}", "{p}.detach()"),
)


def uncast(y: Tensor, x: Tensor) -> Tensor:
    """In x's dtype where autocast leaves the result of mv so."""
    return y.type_as(x) if x.device.type == "cpu" else y


def plus(y: Tensor, addend: Tensor, alpha: float) -> Tensor:
    """The addend in y's dtype, whether or not autocast cast both."""
    return torch.add(y, addend.type_as(y), alpha=alpha)


NAMES: dict[str, Any] = {
    "torch": torch,
    "F": F,
    "nn": nn,
    "operator": operator,
    "aten": torch.ops.aten,
    "checkpoint": checkpoint,
}
NAMES |= {"uncast": uncast, "plus": plus}
"""What the templates refer to."""


def fp8(recipe: str) -> Any:
    """`mm` as the recipe's op, with the block sizes that the shapes call for; of an empty weight, exact."""

    def mm(a: Tensor, b: Tensor, bias: Tensor | None = None, offs: Tensor | None = None) -> Tensor:
        if offs is not None:
            return grouped.op(recipe)(a, b, offs)  # type: ignore[no-any-return]
        if 0 in b.shape:
            return exact(a, b, bias)
        return op(recipe)(a, b, block_size(b.shape[0]), block_size(b.shape[1]), bias=bias)  # type: ignore[no-any-return]

    return mm


def exact(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """`mm` in the operands' own dtype."""
    return a @ b if bias is None else a @ b + bias


def same(x: Tensor, y: Tensor) -> bool:
    """Equal shapes, dtypes and values; a NaN is equal to a NaN."""
    return x.dtype == y.dtype and x.shape == y.shape and bool(((x == y) | (x.isnan() & y.isnan())).all())
