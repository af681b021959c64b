"""The frozen tensors of the models behind torch.compile, which their graphs share."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from fp8fx.errors import FreezeError
from fp8fx.graph.values import storage
from fp8fx.weights.frozen import Frozen
from fp8fx.weights.state import copy_all, kind_text

__all__ = ["STORE", "Entry", "GraphHandle", "nan_placeholder"]


@dataclass
class Entry:
    """A frozen tensor of the store, with weak references to what it was made of, and of which shapes and dtypes."""

    frozen: Frozen
    sources: list[TensorWeakRef]
    kinds: list[tuple[torch.Size, torch.dtype]]
    buffers: tuple[Tensor, ...]

    @property
    def is_alive(self) -> bool:
        """Whether nothing that it was made of is gone, after which no graph reads it."""
        return all(reference() is not None for reference in self.sources)

    def made_of(self, tensors: Sequence[Tensor]) -> bool:
        return len(tensors) == len(self.sources) and all(
            reference() is x for reference, x in zip(self.sources, tensors, strict=True)
        )

    def check(self, tensors: Sequence[Tensor]) -> None:
        """Raises FreezeError where a source has another shape or dtype than when it was frozen."""
        for name, kind, x in zip(self.frozen.sources, self.kinds, tensors, strict=True):
            if kind != (x.shape, x.dtype):
                raise FreezeError(
                    f"{name} was frozen as {kind_text(*kind)} and is now {kind_text(x.shape, x.dtype)}; expected it to keep its "
                    "shape and dtype: build and compile the model anew"
                )


class GraphHandle:
    """Stands for a compiled graph in the store, which knows by it whether that is still there.

    Attributes:
        memory: what the graph reads as it is. Not the parameters: `torch.utils.swap_tensors` refuses one that has a weak reference.
    """

    def __init__(self) -> None:
        self.memory: set[StorageWeakRef] = set()

    @classmethod
    def of(cls, gm: fx.GraphModule) -> GraphHandle:
        """The graph's own."""
        reader: GraphHandle = gm.meta.setdefault("fp8fx_handle", cls())
        return reader


class Store:
    """The frozen tensors of the models behind torch.compile. They live as long as their parameters."""

    def __init__(self) -> None:
        self._entries: Any = WeakTensorKeyDictionary()  # by every source
        self._readers: weakref.WeakSet[GraphHandle] = weakref.WeakSet()
        self._amax: Any = WeakTensorKeyDictionary()
        self._lasting: list[GraphHandle] = []
        self.released: Any = WeakTensorKeyDictionary()  # -> its class
        self._lock = threading.RLock()

    def get(self, frozen: Frozen, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The buffers of `frozen`, made of the parameters `tensors`.

        If another graph has made them before, they are made anew in place, for all graphs, of the values that the parameters have now: a
        write through `.data` leaves no trace by which it could be told.

        Raises:
            FreezeError: a parameter has another shape or dtype than when it was frozen, has been released, or is not finite.
        """
        with self._lock:
            entry: Entry
            for entry in self._entries.get(tensors[0], ()):
                if not entry.made_of(tensors) or not self._equal(entry, frozen, tensors):
                    continue
                entry.check(tensors)
                if entry.buffers[0].device == tensors[0].device:
                    if not any(x in self.released for x in tensors):
                        copy_all(zip(entry.buffers, frozen.make(tensors), strict=True))
                    return tuple(entry.buffers)
            for name, x in zip(frozen.sources, tensors, strict=True):
                self.check_present(name, x)
            kinds = [(x.shape, x.dtype) for x in tensors]
            entry = Entry(frozen, [TensorWeakRef(x) for x in tensors], kinds, frozen.make(tensors))
            for x in tensors:
                self._entries[x] = [*(one for one in self._entries.get(x, ()) if one.is_alive), entry]
            return entry.buffers

    def _equal(self, entry: Entry, frozen: Frozen, tensors: Sequence[Tensor]) -> bool:
        """Whether the entry holds what `frozen` makes of `tensors`, which are its sources."""
        if entry.frozen.key == frozen.key:
            return True
        if entry.frozen.gemm != frozen.gemm:
            return False
        if (part := frozen.part(entry.kinds)) is not None:
            return part == entry.frozen.part(entry.kinds)
        if not any(x in self.released for x in tensors):
            return False
        return entry.frozen.traced(entry.kinds) == frozen.traced(entry.kinds)

    def amax(self, x: Tensor, name: Hashable = None, part: Callable[[Tensor], Tensor] = lambda x: x) -> float:
        """The largest magnitude of a part of `x` by this name, which is remembered for when `x` has been released; 0 on the meta device and
        where nobody has asked for it before the release."""
        with self._lock:
            known: dict[Hashable, float] = self._amax.setdefault(x, {})
            if x not in self.released:
                known[name] = 0.0 if x.device.type == "meta" else float(part(x.detach()).abs().amax())
            return known.get(name, 0.0)

    def check_present(self, name: str, x: Tensor) -> None:
        """Raises FreezeError where `x` has been released."""
        if x in self.released:
            raise FreezeError(
                f"{name} has been released, and a graph needs its value; fp8fx.restore(model, state_dict) brings it back"
            )

    def keep(self, name: str, x: Tensor, reader: GraphHandle) -> None:
        """The graph that is being compiled reads `x` as it is.

        Raises:
            FreezeError: it has been released.
        """
        self.check_present(name, x)
        with self._lock:
            self._readers.add(reader)
            if storage(x) is not None:  # otherwise it is none that could be frozen
                reader.memory.add(StorageWeakRef(x.untyped_storage()))

    def bind(self, reader: GraphHandle, compiled: Any) -> None:
        """What `reader` stands for is compiled to `compiled`, and read for as long as that is there."""
        try:
            compiled.fp8fx_handle = reader
        except AttributeError:  # it takes no attributes
            self._lasting.append(reader)

    def entries(self, tensors: Iterable[Tensor]) -> list[Entry]:
        """The frozen tensors that have a source among these."""
        found = {id(entry): entry for x in tensors for entry in self._entries.get(x, ())}
        return [entry for entry in found.values() if entry.is_alive]

    def releasable(self, x: Tensor) -> bool:
        """Whether `x` was frozen, and no compiled graph reads `x` itself, or anything else in its memory."""
        if x not in self._entries or x in self.released or not x.is_floating_point():  # a NaN takes its place
            return False
        with self._lock:
            memory = StorageWeakRef(x.untyped_storage())
            return not any(memory in reader.memory for reader in self._readers)


STORE = Store()


def nan_placeholder(x: Tensor, device: torch.device | str) -> Tensor:
    """What takes the place of a parameter's values when it is released.

    One NaN, in which all its values are, for a graph of another backend. Of several experts' weights one weight of them: whoever traces
    torch's grouped matmul has to find the strides of one.
    """
    kept = (*(1 for _ in x.shape[:-2]), *x.shape[-2:]) if x.dim() > 2 else (1,) * x.dim()
    return torch.full(kept, torch.nan, dtype=x.dtype, device=device).expand(x.shape)
