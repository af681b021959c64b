"""refresh: what is frozen beside a model is quantized anew."""

from __future__ import annotations

from torch import Tensor, nn

from fp8fx.errors import FreezeError
from fp8fx.weights.state_dicts import uncompiled
from fp8fx.weights.store import STORE

__all__ = ["refresh"]


def refresh(model: nn.Module) -> None:
    """Has the weights of a model compiled with `options={"freeze": True}` quantized anew, without compiling again.

    Such a model sees that its parameters were written to or exchanged, and needs this after a write through `.data`
    alone, which leaves no trace. FP8 weights that are part of a model, as `fp8fx.freeze(model)` and
    `convert(..., freeze=True)` make them, need it never.

    Args:
        model: as given to torch.compile or as it came back.

    Raises:
        GraphError: `model` is no nn.Module.
        FreezeError: nothing is frozen beside it.

    >>> import torch
    >>> model = torch.nn.Linear(64, 32).requires_grad_(False)
    >>> try:
    ...     refresh(model)
    ... except FreezeError as error:
    ...     print(str(error).partition(";")[0])
    nothing is frozen beside this model
    """
    model = uncompiled(model, "refresh")
    attributes = [x for module in model.modules() for x in vars(module).values() if isinstance(x, Tensor)]
    tensors = [*model.parameters(), *model.buffers(), *attributes]
    if not STORE.entries(tensors):
        raise FreezeError(
            'nothing is frozen beside this model; expected one compiled with options={"freeze": True} that has been '
            "called. FP8 weights that are part of a model take new values by model.load_state_dict"
        )
    STORE.forget(tensors)
