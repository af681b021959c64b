"""refresh: new values for frozen weights, in place."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from fp8fx.errors import FreezeError
from fp8fx.graph.values import attribute
from fp8fx.weights.converted_module import FrozenModule
from fp8fx.weights.frozen_tensor import META, Account
from fp8fx.weights.state_dicts import check_state, copy_all, kind_of, state_of, uncompiled
from fp8fx.weights.store import STORE

__all__ = ["refresh"]


def refresh(model: nn.Module, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Has frozen weights quantized anew, without compiling again.

    A model compiled with `options={"freeze": True}` sees that its parameters were written to or exchanged, and needs
    this after a write through `.data` alone, which leaves no trace. What `convert(..., freeze=True)` returned has no
    original weights, and takes a state dict.

    Args:
        model: as given to torch.compile or as it came back; or what `convert(..., freeze=True)` returned.
        state_dict: for a converted model: of the model as it was before freezing, complete.

    Raises:
        GraphError: `model` is no nn.Module.
        FreezeError: nothing is frozen; a state dict for a model that is not converted, or none for one that is; a
            missing or additional name, another shape or dtype; or a weight with inf or NaN. Nothing has been changed
            then.

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
    if state_dict is not None:
        raise FreezeError("refresh got a state dict for a model that is not converted; use model.load_state_dict")
    attributes = [x for module in model.modules() for x in vars(module).values() if isinstance(x, Tensor)]
    tensors = [*model.parameters(), *model.buffers(), *attributes]
    if not STORE.entries(tensors):
        raise FreezeError(
            'nothing of this model is frozen; expected one compiled with options={"freeze": True} that has been '
            "called, or what convert(gm, freeze=True) returned"
        )
    STORE.forget(tensors)


def _refresh_converted(gm: FrozenModule, account: Account, state_dict: Mapping[str, Tensor] | None) -> None:
    if state_dict is None:
        raise FreezeError("a converted model holds no original weights; pass the state dict that has the new ones")
    buffers = {name for frozen in account.frozen for name in frozen.buffers}
    state = {name: x for name, x in state_of(gm).items() if name not in buffers}
    check_state({name: kind_of(x) for name, x in state.items()} | account.dropped, state_dict)
    pairs = [(x, state_dict[name]) for name, x in state.items()]
    values = {**account.constants, **state_dict}
    for frozen in account.frozen:
        old = [attribute(gm, name) for name in frozen.buffers]
        new = frozen.make([values[name].to(old[0].device) for name in frozen.sources])
        pairs += zip(old, new, strict=True)
    copy_all(pairs)
