"""refresh: new values for frozen weights, in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn
from torch.nn import Parameter

from fp8fx.errors import FreezeError
from fp8fx.graph.values import attribute
from fp8fx.weights.converted_module import FrozenModule
from fp8fx.weights.frozen_tensor import META, Account
from fp8fx.weights.state_dicts import check_state, copy_all, kind_of, state_of, uncompiled, without_wrapper
from fp8fx.weights.store import STORE, Entry

__all__ = ["entries_of", "refresh"]

_Pairs = list[tuple[Tensor, Tensor]]
"""Tensors, each with its new values."""


def entries_of(model: nn.Module) -> list[Entry]:
    """What is frozen of the model's tensors, with those that no state dict has.

    Raises:
        FreezeError: nothing of the model is frozen.
    """
    attributes = [x for module in model.modules() for x in vars(module).values() if isinstance(x, Tensor)]
    tensors = [*state_of(model).values(), *model.buffers(), *attributes]
    entries = STORE.entries(tensors)
    if not entries and not any(x in STORE.released for x in tensors):
        raise FreezeError(
            'nothing of this model is frozen; expected one compiled with options={"freeze": True} that has been '
            "called, or what convert(gm, freeze=True) returned"
        )
    return entries


def refresh(model: nn.Module, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Gives a frozen model new weights without compiling it again: quantizes them anew, in place.

    Args:
        model: what `convert(..., freeze=True)` returned, or a model compiled with `options={"freeze": True}` (as given
            to torch.compile or as it came back).
        state_dict: of the model as it was before freezing, complete: what is not frozen is copied too. None takes the
            values that the model's own parameters have now, for a model behind torch.compile whose parameters were not
            released.

    Raises:
        GraphError: `model` is no nn.Module.
        FreezeError: nothing is frozen; a missing or additional name, another shape or dtype, also of the model's own
            parameters since they were frozen; a weight with inf or NaN; or no state dict and the originals are gone.
            Nothing has been changed then.

    >>> import torch, fp8fx
    >>> model = torch.nn.Linear(64, 32).requires_grad_(False)
    >>> frozen = fp8fx.convert(model, freeze=True)
    >>> other = torch.nn.Linear(64, 32)
    >>> refresh(frozen, other.state_dict())
    >>> x = torch.randn(8, 64)
    >>> bool((frozen(x) - other(x)).norm() < 0.1 * other(x).norm())
    True
    """
    model = uncompiled(model, "refresh")
    if isinstance(model, FrozenModule):
        _refresh_converted(model, model.meta[META], state_dict)
        return
    state = state_of(model)
    entries = entries_of(model)
    if state_dict is None:
        for name, x in state.items():
            STORE.check_present(name, x)
        copy_all(_anew(entries, {id(x): x for x in state.values()}))
        return
    values = without_wrapper(state_dict)
    check_state({name: kind_of(x) for name, x in state.items()}, values)
    pairs = _anew(entries, {id(x): values[name] for name, x in state.items()})
    pairs += [(x, values[name]) for name, x in state.items() if x not in STORE.released]
    copy_all(pairs)


def _anew(entries: list[Entry], values: Mapping[int, Tensor]) -> _Pairs:
    """The frozen tensors, each made of its sources' values, which are given by the sources' ids."""
    pairs: _Pairs = []
    for entry in entries:
        sources = [cast(Tensor, reference()) for reference in entry.sources]
        if any(id(x) not in values and isinstance(x, Parameter) for x in sources):
            names = ", ".join(entry.frozen.sources)
            raise FreezeError(f"{names} are frozen together and not all in this module; pass the whole model")
        entry.check(sources)
        device = entry.buffers[0].device
        # A tensor that no state dict has is taken as it is.
        new = entry.frozen.make([values.get(id(x), x).to(device) for x in sources])
        pairs += zip(entry.buffers, new, strict=True)
    return pairs


def _refresh_converted(gm: FrozenModule, account: Account, state_dict: Mapping[str, Tensor] | None) -> None:
    if state_dict is None:
        raise FreezeError("a converted model holds no original weights; pass the state dict that has the new ones")
    buffers = {name for frozen in account.frozen for name in frozen.buffers}
    state = {name: x for name, x in state_of(gm).items() if name not in buffers}
    check_state({name: kind_of(x) for name, x in state.items()} | account.dropped, state_dict)
    pairs: _Pairs = [(x, state_dict[name]) for name, x in state.items()]
    values = {**account.constants, **state_dict}
    for frozen in account.frozen:
        old = [attribute(gm, name) for name in frozen.buffers]
        new = frozen.make([values[name].to(old[0].device) for name in frozen.sources])
        pairs += zip(old, new, strict=True)
    copy_all(pairs)
