"""What a node's value looks like."""

from __future__ import annotations

import itertools
from typing import Any, Final

import torch
from torch import Tensor, fx, nn

from fp8fx.torch_internals import storage_of

__all__ = ["UNKNOWN", "attribute", "fake", "storage", "traced_size", "unused", "value"]


class _Unknown:
    """The value of a node that cannot be told without example inputs."""

    def __repr__(self) -> str:
        return "?"


UNKNOWN: Final = _Unknown()


def value(node: fx.Node) -> Any:
    """What the node computes, tensors as fake ones; UNKNOWN if it cannot be told.

    It is `val` in the node's meta (export, `propagate`) or `example_value` (Dynamo).
    """
    return node.meta.get("val", node.meta.get("example_value", UNKNOWN))


def fake(node: fx.Node) -> Tensor | None:
    """The node's value if it is known to be a tensor."""
    result = value(node)
    return result if isinstance(result, Tensor) else None


def traced_size(size: int | torch.SymInt | None) -> int | None:
    """A size as a number: that of the traced call if it is symbolic, without a guard on it; None if it is not known."""
    if isinstance(size, torch.SymInt):
        traced = size.node.hint
        # Of rows of various lengths, as a nested tensor has, it is no number.
        return traced if isinstance(traced, int) else None
    return size


def attribute(gm: nn.Module, target: str) -> Any:
    """What a get_attr or call_module node's dotted target names."""
    owner: Any = gm
    for part in target.split("."):
        owner = getattr(owner, part)
    return owner


def unused(gm: nn.Module, base: str) -> str:
    """The dotted name `base`, with a number behind it if `gm` has something of that name."""
    for name in itertools.chain((base,), (f"{base}_{i}" for i in itertools.count(1))):
        try:
            attribute(gm, name)
        except AttributeError:
            break
    return name


def storage(x: Tensor | None) -> int | None:
    """Equal for tensors that share memory; None if the tensor does not tell."""
    try:
        return None if x is None else storage_of(x)
    except (NotImplementedError, RuntimeError, ValueError):
        # It is sparse, inside a transform of torch.func, or not initialized.
        return None
