"""State dicts of models with frozen weights: names, checks, copies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from fp8fx.errors import FreezeError, GraphError
from fp8fx.graph.values import storage

__all__ = ["check_state", "copy_all", "kind_text", "plain", "state_of", "unwrapped"]

_COMPILED = "_orig_mod."


def kind_text(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')}{tuple(shape)}"


def unwrapped(model: nn.Module, caller: str) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise GraphError(
            f"{caller} got a {type(model).__name__}; expected the model, as given to torch.compile or as it came back"
        )
    original: Any = getattr(model, "_orig_mod", model)  # what torch.compile returns holds the model so
    return cast(nn.Module, original)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """What the model's state dict holds; its own way there is closed while weights are released."""
    found: dict[str, Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        own = {**module._parameters, **module._buffers}
        names = (name for name in own if name not in module._non_persistent_buffers_set)
        found |= {f"{prefix}.{name}" if prefix else name: x for name in names if (x := own[name]) is not None}
    return found


def plain(state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """With the names of the model itself, of a state dict of what torch.compile returned."""
    if not isinstance(state_dict, Mapping):
        raise FreezeError(
            f"the state dict is a {type(state_dict).__name__}; expected a mapping of names to tensors, nothing was changed"
        )
    if not all(name.startswith(_COMPILED) for name in state_dict):
        return state_dict
    return {name.removeprefix(_COMPILED): x for name, x in state_dict.items()}


def check_state(expected: Mapping[str, tuple[torch.Size, torch.dtype]], given: Mapping[str, Any]) -> None:
    """That `given` has the names, shapes and dtypes of the model before it was frozen; a module's extra state is its own affair."""
    additional = {name for name in given if not name.endswith("_extra_state")} - expected.keys()
    for what, names in (("lacks", expected.keys() - given.keys()), ("has besides", additional)):
        if names:
            shown = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
            raise FreezeError(
                f"the state dict {what} {shown}; expected that of the model as it was before freezing, nothing was changed"
            )
    for name, kind in expected.items():
        if not isinstance(given[name], Tensor):
            raise FreezeError(
                f"{name} is a {type(given[name]).__name__} in the state dict; expected {kind_text(*kind)}, nothing was changed"
            )
        if (found := (given[name].shape, given[name].dtype)) != kind:
            raise FreezeError(
                f"{name} is {kind_text(*found)} in the state dict; expected {kind_text(*kind)}, nothing was changed"
            )
        if given[name].layout != torch.strided or given[name].is_meta:
            what = (
                "on the meta device, without values"
                if given[name].is_meta
                else str(given[name].layout).removeprefix("torch.")
            )
            raise FreezeError(f"{name} is {what} in the state dict; expected a dense tensor, nothing was changed")


def copy_all(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    def memory(x: Tensor) -> tuple[Any, ...]:
        return storage(x), x.storage_offset(), x.stride()

    pairs = [(old, new) for old, new in pairs if memory(old) != memory(new)]
    written = {memory(old)[0] for old, _ in pairs}
    # All values first, where they are other tensors of the same model.
    for old, new in [(old, new.clone() if memory(new)[0] in written else new) for old, new in pairs]:
        with torch.inference_mode(old.is_inference()), torch.no_grad():
            old.copy_(new)
