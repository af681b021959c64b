"""One operator has one name, however it is called; what is a view is told by its schema."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fp8fx.graph.operators import (
    called,
    copies_first,
    is_known,
    name_of_operator,
    overloads,
    spelling,
    tags,
    views_first,
)

aten = torch.ops.aten
SPELLINGS: dict[str, tuple[Any, ...]] = {
    "linear": (F.linear, torch._C._nn.linear, aten.linear, aten.linear.default, aten.linear.out, "linear"),
    "addmm": (torch.addmm, Tensor.addmm, aten.addmm, aten.addmm.default, "addmm"),
    "matmul": (
        torch.matmul,
        Tensor.matmul,
        Tensor.__matmul__,
        torch.linalg.matmul,
        operator.matmul,
        operator.imatmul,
        aten.matmul,
    ),
    "rmatmul": (Tensor.__rmatmul__, "__rmatmul__"),
    "einsum": (torch.einsum, aten.einsum, aten.einsum.default),
    "grouped_mm": (F.grouped_mm, torch._grouped_mm, aten._grouped_mm, aten._grouped_mm.default),
    "numpy_T": (Tensor.T.__get__, "T", "numpy_T", aten.numpy_T, aten.numpy_T.default),
    "matrix_H": (Tensor.H.__get__, "H", aten.matrix_H),
    "detach": (
        torch.detach,
        Tensor.detach,
        "data",
        Tensor.data.__get__,
        torch._C._autograd._get_data_attr,
        aten.detach.default,
    ),
    "transpose": (torch.transpose, "transpose", aten.transpose.int, aten.transpose),
    "split": (torch.split, Tensor.split, "split", aten.split.Tensor),
    "linalg_multi_dot": (torch.linalg.multi_dot, aten.linalg_multi_dot),
    "convert_element_type": (torch.ops.prims.convert_element_type, torch.ops.prims.convert_element_type.default),
    "scaled_dot_product_attention": (F.scaled_dot_product_attention, aten.scaled_dot_product_attention.default),
}


@pytest.mark.parametrize(
    ("name", "target"), [(name, target) for name, targets in SPELLINGS.items() for target in targets]
)
def test_every_spelling_has_the_operator_s_name(name: str, target: Any) -> None:
    assert name_of_operator(target) == name


def linear(x: Tensor) -> Tensor:
    return x


@pytest.mark.parametrize("target", [linear, torch.ao.nn.quantized.functional.linear, torch.ops.quantized.linear])
def test_another_s_function_of_that_name_is_none_of_torch_s(target: Any) -> None:
    assert name_of_operator(target) == ""


def node_of(function: Any) -> fx.Node:
    """The last call in the graph of a function of x."""
    *_, node = (node for node in fx.symbolic_trace(function).graph.nodes if node.op.startswith("call_"))
    return node


VIEWS = {
    "t": lambda x: x.t(),
    "T": lambda x: x.T,
    "aten.numpy_T": lambda x: aten.numpy_T(x),
    "a slice": lambda x: x[1:],
    "as_strided": lambda x: x.as_strided((2, 2), (1, 2)),
    "Tensor.unfold": lambda x: x.unfold(0, 1, 1),
    "diagonal": lambda x: torch.diagonal(x),
    "chunk": lambda x: x.chunk(2),
    "data": lambda x: x.data,
    "aten.view.default": lambda x: aten.view.default(x, [4]),
    "alias": lambda x: aten.alias.default(x),
    "positive": lambda x: torch.positive(x),
}
COPIES = {
    "clone": lambda x: x.clone(),
    "_unsafe_view": lambda x: aten._unsafe_view.default(x, [4]),
    "unsafe_chunk": lambda x: x.unsafe_chunk(2),
    "t_copy": lambda x: torch.t_copy(x),
    "aten.expand_copy": lambda x: aten.expand_copy.default(x, [2, 2]),
}
NEITHER = {
    "relu": lambda x: x.relu(),
    "t_, which changes its argument": lambda x: x.t_(),
    "relu_": lambda x: aten.relu_.default(x),
    "slice_scatter, a view_copy of two": lambda x: torch.slice_scatter(x, x),
    "repeat": lambda x: x.repeat(2, 1),
    "F.unfold, which copies patches": lambda x: F.unfold(x, 1),
    "cpu, which may copy": lambda x: x.cpu(),
    "a sum": lambda x: x + 1,
}


@pytest.mark.parametrize(("function", "views", "copies"), [
    *((f, True, False) for f in VIEWS.values()),
    *((f, False, True) for f in COPIES.values()),
    *((f, False, False) for f in NEITHER.values()),
], ids=[*VIEWS, *COPIES, *NEITHER])  # fmt: skip
def test_views_and_copies(function: Any, views: bool, copies: bool) -> None:
    node = node_of(function)
    assert (views_first(node), copies_first(node)) == (views, copies)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda x: F.linear(x, x), "F.linear"),
        (lambda x: aten.linear(x, x), "aten.linear"),
        (lambda x: aten.mm.default(x, x), "aten.mm"),
        (lambda x: x @ x, "@"),
        (lambda x: x.mm(x), ".mm"),
        (lambda x: torch.mm(x, x), "mm"),
        (lambda x: torch.linalg.matmul(x, x), "linalg.matmul"),
        (lambda x: torch.einsum("ij,jk", x, x), "einsum"),
    ],
)
def test_spelling(function: Any, text: str) -> None:
    assert spelling(node_of(function)) == text


def test_called() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    assert spelling(graph.call_function(operator.imatmul, (x, x))) == "@="
    assert called(x) == ""
    assert called(graph.call_function(getattr, (x, "T"))) == "numpy_T"
    assert called(graph.call_method("mm", (x, x))) == "mm"
    assert called(graph.call_module("linear", (x,))) == ""


def test_overloads_and_tags() -> None:
    assert aten.add.Tensor in overloads("add")
    assert overloads(aten.add.Tensor) == (aten.add.Tensor,)
    assert set(overloads(aten.add)) == set(overloads(torch.add))
    assert overloads("no such operator") == ()
    assert torch.Tag.inplace_view in tags("t_")
    assert torch.Tag.nondeterministic_seeded in tags(torch.rand_like)


def test_what_goes_by_its_name() -> None:
    assert is_known(torch.add)
    assert is_known(operator.add)
    assert not is_known(linear)
