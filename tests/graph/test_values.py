"""Values of nodes: real, fake, of attributes, and which share memory."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from fp8fx.graph.values import UNKNOWN, attribute, fake, storage, value
from tests.support.graphs import Model


def test_value_and_fake() -> None:
    n = fx.Graph().placeholder("x")
    assert value(n) is UNKNOWN
    assert repr(UNKNOWN) == "?"
    assert fake(n) is None
    n.meta["example_value"] = (example := torch.ones(2))
    assert value(n) is fake(n) is example
    n.meta["val"] = 3  # export's goes before Dynamo's
    assert value(n) == 3
    assert fake(n) is None
    n.meta["val"] = None
    assert value(n) is None


def test_attribute() -> None:
    gm = fx.symbolic_trace(Model())
    assert attribute(gm, "w") is gm.w
    assert attribute(gm, "inner.fc.weight") is gm.inner.fc.weight
    with pytest.raises(AttributeError):
        attribute(gm, "inner.missing")


def test_storage_tells_what_shares_memory() -> None:
    x = torch.randn(4, 4)
    assert storage(x) == storage(x.t()[1:]) != storage(x.clone())
    assert (storage(None), storage(x.to_sparse())) == (None, None)
