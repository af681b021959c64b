"""merge: what reads a slice of the one result gets what it got before, in values, strides and memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fp8fx.config import Config
from fp8fx.convert import convert
from tests.support.capture import Capture
from tests.support.siblings import Siblings, assert_same_results, error, example, products, qkv, recipes


def copies(gm: fx.GraphModule) -> list[fx.Node]:
    return list(gm.graph.find_nodes(op="call_method", target="clone"))


READERS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "pointwise": (lambda y: torch.relu(y), False),
    "heads": (lambda y: y.view(2, 3, 4, 4).transpose(1, 2) * 2, False),
    "reshape": (lambda y: y.reshape(6, 16) * 2, False),
    "a view across the sliced dimension": (lambda y: y.view(-1) * 2, True),
    "rows joined": (lambda y: y.view(2, 48) * 2, True),
    "a view of a view": (lambda y: y.view(2, 3, 4, 4).transpose(1, 2).transpose(1, 2).view(2, 48) * 2, True),
    "a view after a pointwise op": (lambda y: torch.relu(y).view(-1), False),
    "another dtype's view": (lambda y: y.view(torch.int32).view(torch.float32) * 2, False),
    "flatten": (lambda y: y.flatten() * 2, False),
    "chunks": (lambda y: y.chunk(2, -1)[0] * y.chunk(2, -1)[1], False),
    "as_strided": (lambda y: torch.as_strided(y, (6, 16), (16, 1)) * 2, True),
    "its own strides": (lambda y: torch.as_strided(y, (2, 3, 4), y.stride()) * 2, False),
    "complex": (lambda y: torch.view_as_real(torch.view_as_complex(y.view(2, 3, 8, 2)) * 1j), False),
    "view_as": (lambda y: y.view_as(torch.empty(96)) * 2, True),
    "in place": (lambda y: y.add_(1).mul_(2), False),
    "reshaped in place": (lambda y: y.view(2, 3, 4, 4).mul_(2).sum((1, 2)), False),
}


@pytest.mark.parametrize("reader", [name for name in READERS if name != "its own strides"])
@pytest.mark.parametrize("n", [(16, 16, 16), (5, 16, 8)], ids=str)
def test_what_reads_a_slice_gets_what_it_got(n: tuple[int, ...], reader: str) -> None:
    function, needs_copy = READERS[reader]
    model = Siblings(lambda p, x: torch.relu(p.q(x)).sum() + function(p.k(x)).sum(-1) + torch.relu(p.v(x)).sum(), n)
    x, old = example(2, 3), convert(model, recipe="rowwise")
    known, unknown = convert(model, (x,), recipe="rowwise", freeze=True), convert(model, recipe="rowwise", freeze=True)
    for new in (known, unknown):
        assert len(products(new)) == 1
        torch.testing.assert_close(new(x), old(x), rtol=1e-5, atol=1e-4)
    if reader not in ("as_strided", "complex", "view_as"):
        assert len(copies(known)) == needs_copy  # only there
    assert len(copies(unknown)) == 3  # whatever may follow


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "reshaped": lambda y: [y.reshape(-1).mul_(3), y][1],
    "contiguous": lambda y: [y.contiguous().mul_(3), y][1],
    "flattened, and read as it was": lambda y: [r := y.flatten(), y.mul_(3), r.view(y.shape)][2],
    "rows taken and raveled": lambda y: [y.chunk(2, 0)[0].ravel().mul_(3), y][1],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("n", [(16, 16, 16), (5, 16, 8)], ids=str)
def test_what_is_changed_through_a_view_of_contiguous_memory_alone_is_copied(n: tuple[int, ...], change: str) -> None:
    def function(p: Siblings, x: Tensor) -> Tensor:
        q, k, v = p.q(x), p.k(x), p.v(x)
        return torch.relu(q).sum() + (CHANGES[change](k) * 2).sum(-1) + torch.relu(v).sum()

    model, x = Siblings(function, n), example(2, 3)
    old, new = convert(model, recipe="rowwise"), convert(model, (x,), recipe="rowwise", freeze=True)
    assert (len(products(new)), len(copies(new))) == (1, 1)
    torch.testing.assert_close(new(x), old(x), rtol=1e-5, atol=1e-4)


def test_a_graph_that_reads_strides_gets_those_it_was_traced_with() -> None:
    function = READERS["its own strides"][0]
    model, x = Siblings(lambda p, x: function(p.q(x)).sum() + function(p.k(x)).sum()), example(2, 3)
    capture = Capture(Config(recipe="rowwise", freeze=True))
    out = torch.compile(model, backend=capture, fullgraph=True)(x)
    torch.testing.assert_close(out, convert(model, recipe="rowwise")(x), rtol=1e-5, atol=1e-4)


def test_an_output_of_the_graph_is_a_tensor_of_its_own() -> None:
    def forward(p: Siblings, x: Tensor) -> tuple[Tensor, ...]:
        return p.q(x), p.k(x).view(2, 3, 4, 4).transpose(1, 2), torch.relu(p.v(x))

    model, x = Siblings(forward), example(2, 3)
    new = convert(model, (x,), recipe="rowwise", freeze=True)
    assert len(copies(new)) == 2
    assert_same_results(new, convert(model, recipe="rowwise"), x)
    outs = new(x)
    assert len({out.untyped_storage().data_ptr() for out in outs}) == 3
    assert all(out.untyped_storage().nbytes() == out.nbytes for out in outs)


@pytest.mark.parametrize("first", [True, False])
def test_a_result_may_be_changed_in_place_where_the_input_has_a_gradient(first: bool) -> None:
    def forward(p: Siblings, x: Tensor) -> Tensor:
        q, k = p.q(x), p.k(x)
        changed, other = (q, k) if first else (k, q)
        return F.relu(changed, inplace=True) * other

    model, x = Siblings(forward), example().requires_grad_()
    results = []
    for new in (
        torch.compile(model, backend=Capture(Config(recipe="rowwise", freeze=True))),
        convert(model, (x,), recipe="rowwise", freeze=True),
        convert(model, recipe="rowwise"),
    ):
        out = new(x)
        results.append((out, *torch.autograd.grad(out.sum(), x)))
    for result in results[:2]:
        torch.testing.assert_close(result[0], results[2][0], rtol=1e-5, atol=1e-6)
        assert (result[1] - results[2][1]).norm() / results[2][1].norm() < 0.06  # the gradient is one GEMM too


@recipes
def test_the_inputs_gradient_is_the_siblings_sum(recipe: str) -> None:
    model, x = (
        Siblings(lambda p, x: torch.cat(qkv(p, x), -1), (8, 24, 16), (True, False, True)),
        example().requires_grad_(),
    )
    new, grad = convert(model, (x,), recipe=recipe, freeze=True), torch.randn(4, 48)
    assert len(products(new, recipe)) == 1
    (value,), (exact,) = torch.autograd.grad(new(x), x, grad), torch.autograd.grad(model(x), x, grad)
    assert 0 < error(value, exact.double()) < 0.08


@pytest.mark.parametrize("rows", [1, 4])
def test_siblings_that_the_graph_returns_share_no_memory(rows: int) -> None:
    gm = convert(Siblings(lambda p, x: (p.q(x), p.k(x))), (example(rows),), freeze=True, profit="always")
    q, k = gm(example(rows))
    assert len(products(gm, "mixed")) == 1
    assert q.untyped_storage().data_ptr() != k.untyped_storage().data_ptr()
    assert q.stride() == k.stride() == (16, 1)
