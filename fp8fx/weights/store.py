"""What is frozen of the tensors that graphs behind torch.compile read, while it is what these tensors hold."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from fp8fx.torch_internals import version_of
from fp8fx.weights.frozen_tensor import Frozen
from fp8fx.weights.state_dicts import Kind, copy_all, kind_of

__all__ = ["STORE", "Entry", "Lookup", "Store"]

_Stamp = tuple[int, int]
"""A tensor's version and address. A write changes the version, unless it is one through `.data`."""


def _stamp(x: Tensor) -> _Stamp:
    return version_of(x), x.data_ptr()


@dataclass(eq=False)
class Entry:
    """A frozen tensor of the store.

    Attributes:
        frozen: how it is made.
        sources: weak references to what it was made of.
        kinds: the shapes and dtypes that these had.
        stamps: their versions and addresses when it was made; None if it is to be made anew.
        buffers: the frozen tensor itself, such as FP8 data and scale.
    """

    frozen: Frozen
    sources: list[TensorWeakRef]
    kinds: list[Kind]
    stamps: list[_Stamp] | None
    buffers: tuple[Tensor, ...]

    @property
    def is_alive(self) -> bool:
        """Whether all that it was made of is still there. No graph reads it afterwards."""
        return all(reference() is not None for reference in self.sources)

    @property
    def is_of_another_kind(self) -> bool:
        """Whether a source has changed its shape, dtype or device since, as a model's cast or move does."""
        sources = [reference() for reference in self.sources]
        kinds = [None if x is None else kind_of(x) for x in sources]
        return kinds != self.kinds or any(x is not None and x.device != self.buffers[0].device for x in sources)

    def is_made_of(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are its sources, in this order."""
        if len(tensors) != len(self.sources):
            return False
        return all(reference() is x for reference, x in zip(self.sources, tensors, strict=True))

    def is_current(self, tensors: Sequence[Tensor]) -> bool:
        """Whether it was made of these, as they are now."""
        return self.stamps is not None and self.is_made_of(tensors) and self.stamps == list(map(_stamp, tensors))

    def make(self, tensors: Sequence[Tensor]) -> None:
        """Makes it anew, in place.

        Raises:
            FreezeError: a source is not finite.
        """
        copy_all(zip(self.buffers, self.frozen.make(tensors), strict=True))
        self.stamps = list(map(_stamp, tensors))


class Store:
    """The frozen tensors of the models behind torch.compile. They live as long as their parameters."""

    def __init__(self) -> None:
        self._entries: Any = WeakTensorKeyDictionary()  # by every source
        self._lock = threading.RLock()

    def get(self, frozen: Frozen, tensors: Sequence[Tensor]) -> Entry:
        """What is frozen of these tensors, as they are now; all graphs that freeze the same share it.

        Raises:
            FreezeError: a tensor is not finite.
        """
        with self._lock:
            entry: Entry
            for entry in self._entries.get(tensors[0], ()):
                fits = entry.buffers[0].device == tensors[0].device and entry.kinds == list(map(kind_of, tensors))
                if not fits or not entry.is_made_of(tensors) or not _is_same(entry, frozen):
                    continue
                if not entry.is_current(tensors):
                    entry.make(tensors)
                return entry
            return self._add(frozen, tensors)

    def _add(self, frozen: Frozen, tensors: Sequence[Tensor]) -> Entry:
        references = [TensorWeakRef(x) for x in tensors]
        stamps = list(map(_stamp, tensors))
        entry = Entry(frozen, references, [kind_of(x) for x in tensors], stamps, frozen.make(tensors))
        for x in tensors:
            alive = [other for other in self._entries.get(x, ()) if other.is_alive and not other.is_of_another_kind]
            self._entries[x] = [*alive, entry]
        return entry

    def forget(self, tensors: Iterable[Tensor]) -> None:
        """Has what is frozen of these made anew when it is next read: they may have been written through `.data`."""
        for entry in self.entries(tensors):
            entry.stamps = None

    def entries(self, tensors: Iterable[Tensor]) -> list[Entry]:
        """The frozen tensors that have a source among these."""
        entries = {id(entry): entry for x in tensors for entry in self._entries.get(x, ())}
        return [entry for entry in entries.values() if entry.is_alive]


def _is_same(entry: Entry, frozen: Frozen) -> bool:
    """Whether the entry holds what `frozen` makes of its sources."""
    if entry.frozen.key == frozen.key:
        return True
    part = frozen.part(entry.kinds)
    return entry.frozen.gemm == frozen.gemm and part is not None and part == entry.frozen.part(entry.kinds)


STORE = Store()
"""That of this process."""


class Lookup(nn.Module):
    """In a graph: what is frozen of the tensors that it is called with, as they are when it is called.

    Args:
        frozen: what is made of them.
        store: keeps it.
    """

    def __init__(self, frozen: Frozen, store: Store) -> None:
        super().__init__()
        self.frozen = frozen
        self._store = store
        self._seen: Any = weakref.WeakValueDictionary()  # entries, by the first tensor's id

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """FP8 data and scale, or a bias.

        Raises:
            FreezeError: a tensor is not finite.
        """
        entry: Entry | None = self._seen.get(id(tensors[0]))
        if entry is None or not entry.is_current(tensors):
            with torch.inference_mode(False):
                entry = self._seen[id(tensors[0])] = self._store.get(self.frozen, tensors)
        return entry.buffers

    def __reduce__(self) -> tuple[Any, ...]:
        return _lookup, (self.frozen,)


def _lookup(frozen: Frozen) -> Lookup:
    """A copy, or what a pickle is of: it looks in the store of the process that it is in."""
    return Lookup(frozen, STORE)
