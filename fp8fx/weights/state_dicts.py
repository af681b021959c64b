"""State dicts of models with frozen weights: names, checks, copies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from fp8fx.errors import FreezeError, GraphError
from fp8fx.graph.values import storage

__all__ = ["Kind", "check_state", "copy_all", "kind_of", "kind_text", "state_of", "uncompiled"]

Kind = tuple[torch.Size, torch.dtype]
"""A tensor's shape and dtype, which it keeps while it is frozen."""

_WRAPPER = "_orig_mod"
"""What torch.compile calls the model inside the module that it returns."""

_SHOWN = 5
"""How many names an error lists at most."""


def kind_of(x: Tensor) -> Kind:
    """The tensor's shape and dtype."""
    return x.shape, x.dtype


def kind_text(kind: Kind) -> str:
    """For people to read: `bfloat16(128, 64)`."""
    shape, dtype = kind
    return f"{str(dtype).removeprefix('torch.')}{tuple(shape)}"


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


def _check_names(expected: Mapping[str, Kind], given: Mapping[str, Any]) -> None:
    # A module's extra state is its own affair.
    names = {name for name in given if not name.endswith("_extra_state")}
    for what, wrong in (("lacks", expected.keys() - given.keys()), ("has besides", names - expected.keys())):
        if wrong:
            shown = ", ".join(sorted(wrong)[:_SHOWN]) + (", ..." if len(wrong) > _SHOWN else "")
            raise FreezeError(
                f"the state dict {what} {shown}; expected that of the model as it was before freezing, "
                "nothing was changed"
            )


def _what_is_wrong(x: Any, kind: Kind) -> str | None:
    """What an entry of a state dict is and must not be; None if it is right."""
    if not isinstance(x, Tensor):
        return f"a {type(x).__name__} in the state dict; expected {kind_text(kind)}"
    if kind_of(x) != kind:
        return f"{kind_text(kind_of(x))} in the state dict; expected {kind_text(kind)}"
    if x.is_meta:
        return "on the meta device, without values in the state dict; expected a dense tensor"
    if x.layout != torch.strided:
        return f"{str(x.layout).removeprefix('torch.')} in the state dict; expected a dense tensor"
    return None


def check_state(expected: Mapping[str, Kind], given: Mapping[str, Any]) -> None:
    """Checks a state dict before anything is written.

    Args:
        expected: shape and dtype by name, of the model as it was before freezing.
        given: the state dict.

    Raises:
        FreezeError: a name is missing or additional, or its entry is no dense tensor of that shape and dtype.
    """
    _check_names(expected, given)
    for name, kind in expected.items():
        if (wrong := _what_is_wrong(given[name], kind)) is not None:
            raise FreezeError(f"{name} is {wrong}, nothing was changed")


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
