"""refresh: new values for frozen weights, in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn
from torch.nn import Parameter

from fp8fx.errors import FreezeError
from fp8fx.graph.values import attribute
from fp8fx.weights.converted import FrozenModule
from fp8fx.weights.frozen import META, Account
from fp8fx.weights.state import check_state, copy_all, plain, state_of, unwrapped
from fp8fx.weights.store import STORE, Entry

__all__ = ["entries_of", "refresh"]


def entries_of(model: nn.Module) -> list[Entry]:
    """What is frozen of the model's tensors, with those that no state dict has."""
    attributes = [x for module in model.modules() for x in vars(module).values() if isinstance(x, Tensor)]
    own = [*state_of(model).values(), *model.buffers(), *attributes]
    entries = STORE.entries(own)
    if not entries and not any(x in STORE.released for x in own):
        raise FreezeError(
            'nothing of this model is frozen; expected one compiled with options={"freeze": True} that has been called, or '
            "what convert(gm, freeze=True) returned"
        )
    return entries


def refresh(model: nn.Module, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Gives a frozen model new weights without compiling it again: quantizes them anew, in place.

    Args:
        model: what `convert(..., freeze=True)` returned, or a model compiled with `options={"freeze": True}` (as given to torch.compile or
            as it came back).
        state_dict: of the model as it was before freezing, complete: what is not frozen is copied too. None takes the values that the
            model's own parameters have now, for one behind torch.compile whose parameters were not released.

    Raises:
        GraphError: `model` is no nn.Module.
        FreezeError: nothing is frozen; a missing or additional name, another shape or dtype, also of the model's own parameters since they
            were frozen; a weight with inf or NaN; or no state dict where the originals are gone. Nothing has been changed then.
    """
    model = unwrapped(model, "refresh")
    if isinstance(model, FrozenModule):
        _refresh_converted(model, model.meta[META], state_dict)
        return
    own = state_of(model)
    entries = entries_of(model)
    new = {id(x): x for x in own.values()}
    if state_dict is None:
        for name, x in own.items():
            STORE.check_present(name, x)
    else:
        state_dict = plain(state_dict)
        check_state({name: (x.shape, x.dtype) for name, x in own.items()}, state_dict)
        new = {id(x): state_dict[name] for name, x in own.items()}
    pairs: list[tuple[Tensor, Tensor]] = []
    for entry in entries:
        sources, device = [cast(Tensor, reference()) for reference in entry.sources], entry.buffers[0].device
        if any(id(x) not in new and isinstance(x, Parameter) for x in sources):
            raise FreezeError(
                f"{', '.join(entry.frozen.sources)} are frozen together and not all in this module; pass the whole model"
            )
        entry.check(sources)
        made = entry.frozen.make(
            [new.get(id(x), x).to(device) for x in sources]
        )  # a tensor that no state dict has is as it is
        pairs += zip(entry.buffers, made, strict=True)
    if state_dict is not None:
        pairs += [(x, state_dict[name]) for name, x in own.items() if x not in STORE.released]
    copy_all(pairs)


def _refresh_converted(gm: FrozenModule, account: Account, state_dict: Mapping[str, Tensor] | None) -> None:
    if state_dict is None:
        raise FreezeError("a converted model holds no original weights; pass the state dict that has the new ones")
    frozen = {name for one in account.frozen for name in one.buffers}
    own = {name: x for name, x in state_of(gm).items() if name not in frozen}
    check_state({name: (x.shape, x.dtype) for name, x in own.items()} | account.dropped, state_dict)
    pairs: list[tuple[Tensor, Tensor]] = [(x, state_dict[name]) for name, x in own.items()]
    new = {**account.constants, **state_dict}
    for one in account.frozen:
        buffers = [attribute(gm, name) for name in one.buffers]
        made = one.make([new[name].to(buffers[0].device) for name in one.sources])
        pairs += zip(buffers, made, strict=True)
    copy_all(pairs)
