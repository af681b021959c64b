"""Masks of symbolic sizes: what is said of one holds for every size, whatever it is written as."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, fx

from fp8fx.graph.masks import Hidden, hidden_by, hidden_for_any_size

LENGTHS = (*range(2, 10), 300)


def nodes_of(make: Callable[[int], Tensor]) -> list[fx.Node]:
    """The nodes that make a mask, of a symbolic size."""
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: object) -> Callable[..., object]:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(lambda x: make(x.shape[0]), backend=backend, dynamic=True)(torch.zeros(7))
    (gm,) = graphs
    (mask,) = gm.graph.output_node().all_input_nodes
    reached = {mask}
    pending = [mask]
    while pending:
        sources = set(pending.pop().all_input_nodes) - reached
        reached |= sources
        pending += sources
    return sorted(node for node in reached if node.op != "placeholder" or "SymInt" in str(node.type))


def verdict(make: Callable[[int], Tensor]) -> Hidden | None:
    """What is said of the mask for any size, which has to hold for each of LENGTHS."""
    said = hidden_for_any_size(nodes_of(make))
    if said is not None:
        assert {hidden_by(make(length)) for length in LENGTHS} == {said}
    return said


A = torch.arange

CAUSAL: list[Callable[[int], Tensor]] = [
    lambda n: A(n)[None] <= A(n)[:, None],
    lambda n: A(n)[:, None] > A(n) - 1,
    lambda n: (A(n)[:, None] - A(n)) >= 0,
    lambda n: (A(1, n + 1)[:, None] - A(1, n + 1)) >= 0,
    lambda n: A(0, 2 * n, 2)[:, None] - A(n)[:, None] >= A(n),
    lambda n: ~torch.ones(n, n, dtype=torch.bool).triu(1),
    lambda n: (A(n)[:, None] >= A(n)) & (A(n) >= 0),
    lambda n: torch.ones(n, n, dtype=torch.bool).tril().clone()[None, None],
]


@pytest.mark.parametrize("place", range(len(CAUSAL)))
def test_what_is_causal_for_any_size(place: int) -> None:
    assert verdict(CAUSAL[place]) is Hidden.LATER_KEYS


def repeated(n: int) -> Tensor:
    """Of nodes that are read twice each, twelve times over."""
    p = A(n)
    for _ in range(12):
        p = p + p - p
    return p[:, None] >= p


def test_a_node_that_is_read_often_is_looked_at_once() -> None:
    assert verdict(repeated) is Hidden.LATER_KEYS


NOT_KNOWN: list[Callable[[int], Tensor]] = [
    lambda n: A(n)[None] <= A(1, end=n + 1)[:, None],
    lambda n: A(n)[None] <= A(0, 2 * n, step=2)[:, None],
    lambda n: torch.ones(n, n, dtype=torch.long).tril() != 0,
    lambda n: torch.ones(n, n, dtype=torch.bool).tril() != 0,
    lambda n: torch.ones(n, n, dtype=torch.long).tril() > 0,
    lambda n: (A(n)[:, None] >= A(n)).to(torch.int32) != 0,
    lambda n: (A(n, dtype=torch.uint8)[:, None] - A(n, dtype=torch.uint8)) >= 0,
    lambda n: A(n, dtype=torch.uint8)[:, None] >= A(n, dtype=torch.uint8),
    lambda n: A(n).to(torch.int8)[:, None] >= A(n).to(torch.int8),
    lambda n: torch.ones(n, dtype=torch.bool).cumsum(0, dtype=torch.uint8)[:, None] > A(n),
    lambda n: (A(n)[:, None] & 1) >= A(n),
    lambda n: (A(n)[:, None] & -1) >= A(n),
    lambda n: ~A(n)[:, None] <= A(n),
    lambda n: (torch.ones(n, n, dtype=torch.bool) + torch.ones(n, n, dtype=torch.bool)) >= 2,
    lambda n: A(n) <= A(n)[A(n) - 1][:, None] + 1,
    lambda n: A(n) >= 0,
    lambda n: A(n).float()[:, None] >= A(n),
    lambda n: torch.add(A(n)[:, None], A(n), alpha=-1) >= 0,
]


@pytest.mark.parametrize("place", range(len(NOT_KNOWN)))
def test_nothing_is_said_of_what_no_table_is_known(place: int) -> None:
    assert verdict(NOT_KNOWN[place]) is None


def vectors(chance: random.Random) -> str:
    """A vector of integers, of length n."""
    counted = "torch.ones(n, dtype=torch.bool).cumsum(0)"
    text = chance.choice(["A(n)", "A(n)", "A(1, n + 1)", "A(0, 2 * n, 2)", counted])
    for _ in range(chance.randrange(3)):
        more = chance.choice(["+ 0", "+ 1", "+ 2", "- 1", "- 2", "* 2"])
        text = f"({text} {more})"
    return text if chance.random() < 0.8 else f"{text}[A(n)]"


def squares(chance: random.Random, depth: int) -> str:
    """A mask (n, n)."""
    if depth == 0 or chance.random() < 0.3:
        row, column = vectors(chance), vectors(chance)
        comparison = chance.choice(["<", "<=", ">", ">=", ">=", "==", "!="])
        return f"({row}[:, None] {comparison} {column}[None, :])"
    if chance.random() < 0.3:
        kind = chance.choice(["tril", "triu"])
        return f"torch.ones(n, n, dtype=torch.bool).{kind}({chance.randrange(-2, 3)})"
    if chance.random() < 0.3:
        return f"(~{squares(chance, depth - 1)})"
    return f"({squares(chance, depth - 1)} & {squares(chance, depth - 1)})"


def programs() -> Iterator[str]:
    chance = random.Random(0)
    while True:
        yield squares(chance, 2)


@pytest.mark.slow
def test_any_mask() -> None:
    said = []
    for text, _ in zip(programs(), range(120), strict=False):
        said.append(verdict(eval(f"lambda n: {text}", {"A": A, "torch": torch})))
    assert said.count(Hidden.LATER_KEYS) >= 3
    assert said.count(None) > 60
