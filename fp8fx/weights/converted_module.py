"""A GraphModule that holds frozen tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from fp8fx.errors import FreezeError
from fp8fx.weights.frozen_tensor import META, Account

__all__ = ["FrozenModule"]

_SHOWN = 5
"""How many names an error lists at most."""


class FrozenModule(fx.GraphModule):
    """A GraphModule that holds frozen tensors. It and its copies refuse the state dict of the model before freezing.

    It is a class of its own, not a hook: fx's pickles and shallow copies have no hooks, nor do pickles have its meta.
    """

    @classmethod
    def of(cls, gm: fx.GraphModule) -> FrozenModule:
        """Takes the place of `gm`, whose meta has an Account."""
        for node in gm.graph.nodes:
            if isinstance(node.type, str):
                # An annotation under `from __future__ import annotations`, which fx cannot pickle.
                node.type = None
        new = cls.__new__(cls)
        new.__dict__.update(gm.__dict__)
        type(new).__name__ = type(gm).__name__
        new.graph = gm.graph
        return new

    def _originals(self, state_dict: Mapping[str, Any], prefix: str) -> set[str]:
        """The names of weights that are frozen here and for which `state_dict` does not bring what was frozen of them.

        A weight that is tied to an embedding is still here itself, and would come without its frozen copy.
        """
        account: Account = self.meta[META]
        originals = set(account.dropped)
        for frozen in account.frozen:
            if all(prefix + buffer in state_dict for buffer in frozen.buffers):
                continue
            for source in frozen.sources:
                originals |= {source, *account.names.get(source, ())}
        return originals

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        wrong = sorted(name for name in self._originals(state_dict, prefix) if prefix + name in state_dict)
        if wrong:
            raise FreezeError(
                f"the state dict has {', '.join(wrong[:_SHOWN])}, which this model holds frozen; "
                "fp8fx.refresh(model, state_dict) takes that of the model as it was before freezing"
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
