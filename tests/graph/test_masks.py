"""What a mask hides, told from its values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fp8fx.graph.masks import Hidden, hidden_by

SEEN = torch.ones(8, 8, dtype=torch.bool).tril()
WINDOW = SEEN & ~torch.ones(8, 8, dtype=torch.bool).tril(-3)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def added(seen: Tensor, dtype: torch.dtype, hidden: float) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, hidden)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(8, 8), (1, 1, 8, 8), (2, 3, 8, 8)], ids=str)
def test_the_keys_behind_the_query(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    seen = SEEN.expand(shape)
    for mask in (seen, added(seen, dtype, -torch.inf), added(seen, dtype, torch.finfo(dtype).min)):
        assert hidden_by(mask) is Hidden.LATER_KEYS
        assert hidden_by(mask.transpose(-1, -2)) is None


@pytest.mark.parametrize(("queries", "keys"), [(3, 8), (8, 3), (2, 2)])
def test_the_diagonal_starts_at_the_top_left_as_sdpa_has_it(queries: int, keys: int) -> None:
    q, k = torch.randn(1, queries, 16), torch.randn(1, keys, 16)
    mask = torch.ones(queries, keys, dtype=torch.bool).tril()
    assert hidden_by(mask) is Hidden.LATER_KEYS
    by_mask = torch.nn.functional.scaled_dot_product_attention(q, k, k, mask)
    torch.testing.assert_close(torch.nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True), by_mask)
    if queries < keys:
        assert hidden_by(torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)) is None


@pytest.mark.parametrize("shape", [(8, 8), (1, 8), (8, 1), (1, 1), (2, 1, 1, 8), (8,)], ids=str)
def test_nothing(shape: tuple[int, ...]) -> None:
    assert hidden_by(torch.ones(shape, dtype=torch.bool)) is Hidden.NOTHING
    assert hidden_by(torch.zeros(shape)) is Hidden.NOTHING


OTHERS = {
    "a window": WINDOW,
    "a prefix": SEEN | (torch.arange(8) < 2),
    "documents": SEEN & (torch.arange(8)[:, None] // 4 == torch.arange(8) // 4),
    "padding": SEEN & (torch.arange(8) < 7),
    "all": torch.zeros(8, 8, dtype=torch.bool),
    "all of a row": SEEN & (torch.arange(8)[:, None] != 5),
    "one row for every query": SEEN[:1],
    "another in one head": torch.stack([SEEN, SEEN | True]),
    "a bias": torch.randn(8, 8),
    "a small number": added(SEEN, torch.float32, -1e4),
    "a bias of what is seen": added(SEEN, torch.float32, -torch.inf) - 0.5,
    "infinity": added(SEEN, torch.float32, torch.inf),
    "not a number": added(SEEN, torch.float32, torch.nan),
    "not a number among what is seen": added(SEEN, torch.float32, -torch.inf).index_fill(1, torch.tensor(0), torch.nan),
}


@pytest.mark.parametrize("name", OTHERS)
def test_anything_else(name: str) -> None:
    mask = OTHERS[name]
    assert hidden_by(mask) is None
    if mask.dtype == torch.bool and name != "one row for every query":
        for hidden in (-torch.inf, torch.finfo(torch.bfloat16).min):
            assert hidden_by(added(mask, torch.bfloat16, hidden)) is None
