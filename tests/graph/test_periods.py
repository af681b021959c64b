"""Equal stretches of a graph: what is found, where it is cut, and what is not taken for equal."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx

from fp8fx.graph.periods import Stretch, equal_stretches


def calls_of(function: Callable[..., Tensor]) -> list[fx.Node]:
    graph = fx.symbolic_trace(function).graph
    return [node for node in graph.nodes if node.op.startswith("call_")]


def is_matmul(node: fx.Node) -> bool:
    return node.target == "matmul"


def stretches(function: Callable[..., Tensor], may_repeat: Callable[[fx.Node], bool] = bool) -> list[list[Stretch]]:
    return list(equal_stretches(calls_of(function), may_repeat, is_matmul))


def names(stretch: Stretch) -> list[str]:
    return [str(getattr(node.target, "__name__", node.target)) for node in stretch.nodes]


def residual(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return x + x.sin().matmul(w).relu().matmul(v)


def five_layers(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    x = x.cos().matmul(w)
    for _ in range(5):
        x = residual(x, w, v)
    return x.tanh().matmul(v)


def test_layers_are_cut_behind_a_gemm_where_the_fewest_values_cross() -> None:
    ((first, *rest),) = stretches(five_layers)
    assert names(first) == ["relu", "matmul", "add", "sin", "matmul"]  # what follows a GEMM may be fused with it
    assert [names(stretch) for stretch in rest] == [names(first)] * 3
    assert {stretch.wiring() for stretch in rest} == {first.wiring()}
    assert [node.name for node in first.inputs] == ["matmul_1", "v", "matmul", "w"]
    assert [node.name for node in first.outputs] == ["add", "matmul_3"]


def test_two_kinds_of_layers_are_two_lists() -> None:
    def model(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        x = five_layers(x, w, v)
        for _ in range(3):
            x = x.exp().matmul(w).sigmoid()
        return x

    assert [len(found) for found in stretches(model)] == [4, 2]


def test_two_layers_are_too_few() -> None:
    def model(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return residual(residual(x, w, v), w, v)

    assert stretches(model) == []


@pytest.mark.parametrize("number", [1, 2.0, True], ids=str)
def test_constants_tell_calls_apart(number: float) -> None:
    def model(x: Tensor, w: Tensor) -> Tensor:
        for exponent in (2, 2, number, 2, 2):
            x = torch.pow(x, exponent).matmul(w)
        return x

    assert stretches(model) == []


def test_what_may_not_repeat_parts_stretches() -> None:
    def model(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return five_layers(five_layers(x, w, v).bernoulli(), w, v)

    found = stretches(model, lambda node: node.target != "bernoulli")
    assert [len(stretches) for stretches in found] == [4, 4]
    assert not any("bernoulli" in names(stretch) for group in found for stretch in group)


def test_the_wiring_tells_who_reads_whom() -> None:
    def model(x: Tensor, w: Tensor) -> Tensor:
        first = x
        for i in range(4):
            y = x.sin().matmul(w)
            x = torch.add(y, first if i == 2 else x)
        return x

    ((*found,),) = stretches(model)
    assert len({stretch.wiring() for stretch in found}) == 2


def test_a_value_that_is_read_twice_is_one_input() -> None:
    def model(x: Tensor, w: Tensor) -> Tensor:
        for _ in range(4):
            x = torch.add(x.matmul(w), w)
        return x

    ((first, *_),) = stretches(model)
    assert [node.name for node in first.inputs].count("w") == 1


@given(st.lists(st.sampled_from(["sin", "cos", "exp"]), min_size=1, max_size=6), st.integers(3, 6), st.integers(0, 3))
def test_stretches_follow_each_other_and_are_equal(layer: list[str], times: int, before: int) -> None:
    def model(x: Tensor) -> Tensor:
        for method in ["tanh", "sign", "neg"][:before] + layer * times:
            x = getattr(x, method)()
        return x

    calls = calls_of(model)
    found = list(equal_stretches(calls, bool, lambda node: True))
    assert found
    for group in found:
        assert len(group) >= 2
        assert len({tuple(names(stretch)) for stretch in group}) == 1
        joined = [node for stretch in group for node in stretch.nodes]
        start = calls.index(joined[0])
        assert joined == calls[start : start + len(joined)]
