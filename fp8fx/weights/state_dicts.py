"""What the state dict of a model has, and copies of values."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from fp8fx.errors import GraphError
from fp8fx.graph.values import storage

__all__ = ["Kind", "copy_all", "kind_of", "state_of", "uncompiled"]

Kind = tuple[torch.Size, torch.dtype]
"""A tensor's shape and dtype, which it keeps while it is frozen."""

_WRAPPER = "_orig_mod"
"""What torch.compile calls the model inside the module that it returns."""


def kind_of(x: Tensor) -> Kind:
    """The tensor's shape and dtype."""
    return x.shape, x.dtype


def uncompiled(model: nn.Module, caller: str) -> nn.Module:
    """The model itself, of what torch.compile returned.

    Raises:
        GraphError: `model` is no nn.Module; the error names the `caller`.
    """
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise GraphError(f"{caller} got a {kind}; expected the model, as given to torch.compile or as it came back")
    return cast(nn.Module, getattr(model, _WRAPPER, model))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """What the model's state dict has, by name; `state_dict()` itself raises while weights are released."""
    state: dict[str, Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        tensors = {**module._parameters, **module._buffers}
        for name, x in tensors.items():
            if x is not None and name not in module._non_persistent_buffers_set:
                state[f"{prefix}.{name}" if prefix else name] = x
    return state


def copy_all(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Writes new values into tensors, in place: pairs of a tensor and its values, which may be in the same memory."""

    def place(x: Tensor) -> tuple[Any, ...]:
        return storage(x), x.storage_offset(), x.stride()

    changed = [(old, new) for old, new in pairs if place(old) != place(new)]
    written = {storage(old) for old, _ in changed}
    # First all values, since they may be other tensors of the same model.
    values = [new.clone() if storage(new) in written else new for _, new in changed]
    for (old, _), new in zip(changed, values, strict=True):
        with torch.inference_mode(old.is_inference()), torch.no_grad():
            old.copy_(new)
