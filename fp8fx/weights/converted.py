"""A GraphModule that holds frozen tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from fp8fx.errors import FreezeError
from fp8fx.weights.frozen import META, Account

__all__ = ["FrozenModule"]


class FrozenModule(fx.GraphModule):
    """A GraphModule that holds frozen tensors. It and every copy of it refuse the state dict of the model as it was before freezing.

    A class of its own, not a hook: fx's pickles and shallow copies have no hooks, nor do pickles have its meta.
    """

    @classmethod
    def of(cls, gm: fx.GraphModule) -> FrozenModule:
        """Takes the place of `gm`, whose meta has an Account."""
        for node in gm.graph.nodes:
            if isinstance(
                node.type, str
            ):  # an annotation under `from __future__ import annotations`, which fx cannot pickle
                node.type = None
        new = cls.__new__(cls)
        new.__dict__.update(gm.__dict__)
        type(new).__name__ = type(gm).__name__
        new.graph = gm.graph
        return new

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        account: Account = self.meta[META]
        stale = {  # what it still holds itself, as of a weight tied to an embedding, would come without what was frozen of it
            name
            for one in account.frozen
            if not all(prefix + buffer in state_dict for buffer in one.buffers)
            for source in one.sources
            for name in (source, *account.names.get(source, ()))
        }
        if found := sorted(name for name in stale | account.dropped.keys() if prefix + name in state_dict):
            raise FreezeError(
                f"the state dict has {', '.join(found[:5])}, which this model holds frozen; fp8fx.refresh(model, state_dict) takes that "
                "of the model as it was before freezing"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __copy__(self) -> FrozenModule:
        return FrozenModule.of(super().__copy__())

    def __reduce__(self) -> tuple[Any, ...]:
        build, arguments = super().__reduce__()
        return _unpickled, (build, arguments, self.meta)


def _unpickled(build: Callable[..., fx.GraphModule], arguments: tuple[Any, ...], meta: dict[str, Any]) -> FrozenModule:
    gm = build(*arguments)
    gm.meta.update(meta)
    return FrozenModule.of(gm)
