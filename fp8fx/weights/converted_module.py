"""A GraphModule that holds FP8 weights, and takes the state dict of the model that it was converted from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fp8fx.errors import FreezeError
from fp8fx.graph.hooks import own_hooks
from fp8fx.ops.fp8_tensor import FP8Tensor
from fp8fx.ops.fp8_weight import FP8Weight
from fp8fx.weights.frozen_tensor import Frozen
from fp8fx.weights.saved import SCALE, attach, is_fp8
from fp8fx.weights.state_dicts import state_of

__all__ = ["META", "Account", "FrozenModule", "Source", "quantized"]

META = "fp8fx_frozen"
"""In the meta of a converted GraphModule: its Account."""


@dataclass(frozen=True)
class Source:
    """A tensor that the model had: all its names, as a tied head has two, and its shape."""

    names: tuple[str, ...]
    shape: torch.Size


@dataclass
class Account:
    """What a converted GraphModule holds that the model did not have so, and of what it is made.

    Attributes:
        made: an FP8 weight, or siblings' biases, by its name here.
        sources: what these are made of, by the names in `Frozen.sources`.
        constants: what they are made of that no state dict has, by name.
    """

    made: dict[str, Frozen] = field(default_factory=dict)
    sources: dict[str, Source] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)

    def remember(
        self, name: str, frozen: Frozen, tensors: Sequence[Tensor], names: Mapping[int, list[str]], saved: Set[str]
    ) -> None:
        """Adds what is frozen of these tensors, which have these names by their ids; a state dict has the `saved`."""
        self.made[name] = frozen
        for source, x in zip(frozen.sources, tensors, strict=True):
            if source in saved:
                self.sources[source] = Source(tuple(names[id(x)]), x.shape)
            elif not saved.isdisjoint(frozen.sources):  # what is made of constants alone, no state dict changes
                self.constants[source] = x

    def __or__(self, other: Account) -> Account:
        return Account(self.made | other.made, self.sources | other.sources, self.constants | other.constants)


class FrozenModule(fx.GraphModule):
    """A GraphModule that holds FP8 weights. It and its copies save and load them as plain tensors.

    It is a class of its own: fx's pickles and copies lose the hooks of modules, and pickles their meta.
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
        own_hooks(new)
        attach(new)
        return new

    def _load_from_state_dict(self, state_dict: MutableMapping[str, Any], prefix: str, *args: Any) -> None:
        account: Account = self.meta[META]
        given = _ModelState(account, state_dict, prefix, state_of(self))
        for name, frozen in account.made.items():
            if prefix + name not in state_dict and (value := given.made(name, frozen)) is not None:
                state_dict[prefix + name] = value
        gone = {name for source in account.sources.values() for name in source.names} - given.own.keys()
        for name in gone:
            state_dict.pop(prefix + name, None)
            state_dict.pop(prefix + name + SCALE, None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __copy__(self) -> FrozenModule:
        return FrozenModule.of(super().__copy__())

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenModule:
        new: Any = super().__deepcopy__(memo)
        attach(new)
        return new  # type: ignore[no-any-return]

    def __reduce__(self) -> tuple[Any, ...]:
        build, arguments = super().__reduce__()
        return _unpickled, (build, arguments, self.meta)


def _is_scale(scale: Any, data: Tensor) -> bool:
    """Whether it can be the scale of this data: it multiplies each row, or all of it."""
    if not isinstance(scale, Tensor) or scale.dtype != torch.float32:
        return False
    if scale.numel() == 1 or scale.dim() != data.dim():
        return scale.numel() == 1
    return all(n in (1, m) for n, m in zip(scale.shape, data.shape, strict=True))


def _unpickled(build: Callable[..., fx.GraphModule], arguments: tuple[Any, ...], meta: dict[str, Any]) -> FrozenModule:
    gm = build(*arguments)
    gm.meta.update(meta)
    return FrozenModule.of(gm)


def quantized(frozen: Frozen, value: Tensor, recipe: str, *, is_transposed: bool) -> FP8Weight:
    """An FP8 weight of what is frozen.

    Raises:
        FreezeError: the value is not finite.
    """
    try:
        return FP8Weight(value, recipe, transposed=is_transposed)
    except FreezeError as error:
        raise FreezeError(f"{', '.join(frozen.sources)}: {error}; nothing was changed") from None


@dataclass(frozen=True)
class _ModelState:
    """What a state dict of the model, as it was before, gives a converted module.

    Attributes:
        account: the module's.
        state_dict, prefix: as torch loads them.
        own: what the module has, by name.
    """

    account: Account
    state_dict: MutableMapping[str, Any]
    prefix: str
    own: dict[str, Tensor]

    def made(self, name: str, frozen: Frozen) -> Tensor | None:
        """What is here under this name, made of the state dict; None if that has nothing of what it is made of.

        Raises:
            FreezeError: the state dict lacks a part of it, or a part is of another shape or not finite.
        """
        own = self.own[name]
        values = {source: self._value(source) for source in frozen.sources if source in self.account.sources}
        given = [x for x in values.values() if x is not None]
        if not given:
            return None if values else own.detach()
        if len(given) < len(values):
            missing = next(source for source, x in values.items() if x is None)
            raise FreezeError(
                f"the state dict lacks {self.prefix + missing}, which this model holds in one FP8 weight with others "
                "that it has; nothing was changed"
            )
        tensors = {**self.account.constants, **values}
        value = frozen.value([tensors[source].to(given[0].device) for source in frozen.sources])  # type: ignore[union-attr]
        if not isinstance(own, FP8Weight):
            return value
        # Of a weight with K or N of 1 the strides do not tell.
        is_transposed = value.shape == own.shape and (own.is_transposed or value.shape != value.mT.shape)
        value = value.float() if is_transposed else value.mT.float()
        weight = quantized(frozen, value, own.recipe, is_transposed=is_transposed)
        return own.like(weight.qdata, weight.scale)

    def _value(self, name: str) -> Tensor | None:
        """A source's value in the state dict, in high precision."""
        source = self.account.sources[name]
        key = next((key for alias in source.names if (key := self.prefix + alias) in self.state_dict), None)
        if key is None:
            return None
        value, scale = self.state_dict[key], self.state_dict.get(key + SCALE)
        if not isinstance(value, Tensor) or value.shape != source.shape:
            what = tuple(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise FreezeError(f"{key}: {what} in the state dict; expected {tuple(source.shape)}; nothing was changed")
        if is_fp8(value) != (scale is not None):
            what = "FP8 data without a scale" if scale is None else f"{value.dtype} with a scale; expected FP8 data"
            raise FreezeError(f"{key}: {what}; nothing was changed")
        if scale is not None:
            if not _is_scale(scale, value):
                raise FreezeError(
                    f"{key + SCALE}: expected float32, one value or one for each row of {tuple(value.shape)}; "
                    "nothing was changed"
                )
            value = value.as_subclass(Tensor).float() * scale
        return value.dequantize() if isinstance(value, FP8Tensor) else value
