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
from fp8fx.weights.frozen_tensor import Frozen
from fp8fx.weights.state_dicts import Kind, copy_all, kind_of, kind_text

__all__ = ["STORE", "Entry", "GraphHandle", "Store", "nan_placeholder"]


@dataclass
class Entry:
    """A frozen tensor of the store.

    Attributes:
        frozen: how it is made.
        sources: weak references to what it was made of.
        kinds: the shapes and dtypes that these had.
        buffers: the frozen tensor itself, such as FP8 data and scale.
    """

    frozen: Frozen
    sources: list[TensorWeakRef]
    kinds: list[Kind]
    buffers: tuple[Tensor, ...]

    @property
    def is_alive(self) -> bool:
        """Whether all that it was made of is still there. No graph reads it afterwards."""
        return all(reference() is not None for reference in self.sources)

    def is_made_of(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are its sources, in this order."""
        if len(tensors) != len(self.sources):
            return False
        return all(reference() is x for reference, x in zip(self.sources, tensors, strict=True))

    def check(self, tensors: Sequence[Tensor]) -> None:
        """Checks its sources before it is made anew.

        Raises:
            FreezeError: a source has another shape or dtype than when it was frozen.
        """
        for name, kind, x in zip(self.frozen.sources, self.kinds, tensors, strict=True):
            if kind_of(x) != kind:
                raise FreezeError(
                    f"{name} was frozen as {kind_text(kind)} and is now {kind_text(kind_of(x))}; expected it to keep "
                    "its shape and dtype: build and compile the model anew"
                )


class GraphHandle:
    """Stands for a compiled graph in the store. The store sees by it whether the graph is still there.

    Attributes:
        memory: what the graph reads in high precision. These are no references to parameters, since
            `torch.utils.swap_tensors` refuses a parameter that has a weak reference.
    """

    def __init__(self) -> None:
        self.memory: set[StorageWeakRef] = set()

    @classmethod
    def of(cls, gm: fx.GraphModule) -> GraphHandle:
        """The graph's own."""
        handle: GraphHandle = gm.meta.setdefault("fp8fx_handle", cls())
        return handle


class Store:
    """The frozen tensors of the models behind torch.compile. They live as long as their parameters.

    Attributes:
        released: the parameters that `release` has freed; by each the class that it had.
    """

    def __init__(self) -> None:
        self.released: Any = WeakTensorKeyDictionary()
        self._entries: Any = WeakTensorKeyDictionary()  # by every source
        self._amaxes: Any = WeakTensorKeyDictionary()
        self._graphs: weakref.WeakSet[GraphHandle] = weakref.WeakSet()
        self._lasting_graphs: list[GraphHandle] = []
        self._lock = threading.RLock()

    def get(self, frozen: Frozen, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The buffers of `frozen`, made of the parameters `tensors`.

        If another graph has made them before, they are made anew in place, for all graphs, of the values that the
        parameters have now. A write through `.data` leaves no trace by which it could be told.

        Raises:
            FreezeError: a parameter has another shape or dtype than when it was frozen, was released, or is not finite.
        """
        with self._lock:
            entry: Entry
            for entry in self._entries.get(tensors[0], ()):
                if not entry.is_made_of(tensors) or not self._is_same(entry, frozen, tensors):
                    continue
                entry.check(tensors)
                if entry.buffers[0].device == tensors[0].device:
                    if not any(x in self.released for x in tensors):
                        copy_all(zip(entry.buffers, frozen.make(tensors), strict=True))
                    return tuple(entry.buffers)
            return self._add(frozen, tensors)

    def _add(self, frozen: Frozen, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        for name, x in zip(frozen.sources, tensors, strict=True):
            self.check_present(name, x)
        references = [TensorWeakRef(x) for x in tensors]
        entry = Entry(frozen, references, [kind_of(x) for x in tensors], frozen.make(tensors))
        for x in tensors:
            alive = [other for other in self._entries.get(x, ()) if other.is_alive]
            self._entries[x] = [*alive, entry]
        return entry.buffers

    def _is_same(self, entry: Entry, frozen: Frozen, tensors: Sequence[Tensor]) -> bool:
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
        """The largest magnitude of a part of `x` by this name, remembered for when `x` has been released.

        It is 0 on the meta device, and if nobody has asked for it before the release.
        """
        with self._lock:
            amaxes: dict[Hashable, float] = self._amaxes.setdefault(x, {})
            if x not in self.released:
                amaxes[name] = 0.0 if x.device.type == "meta" else float(part(x.detach()).abs().amax())
            return amaxes.get(name, 0.0)

    def check_present(self, name: str, x: Tensor) -> None:
        """Checks a parameter whose value is needed.

        Raises:
            FreezeError: it has been released.
        """
        if x in self.released:
            raise FreezeError(
                f"{name} has been released, and a graph needs its value; "
                "fp8fx.restore(model, state_dict) brings it back"
            )

    def keep(self, name: str, x: Tensor, graph: GraphHandle) -> None:
        """Takes note that a graph, which is being compiled, reads `x` in high precision.

        Raises:
            FreezeError: it has been released.
        """
        self.check_present(name, x)
        with self._lock:
            self._graphs.add(graph)
            if storage(x) is not None:  # otherwise it is no tensor that could be frozen
                graph.memory.add(StorageWeakRef(x.untyped_storage()))

    def bind(self, graph: GraphHandle, compiled: Any) -> None:
        """Lets a graph's handle live as long as `compiled`, what the graph was compiled to."""
        try:
            compiled.fp8fx_handle = graph
        except AttributeError:  # it takes no attributes
            self._lasting_graphs.append(graph)

    def entries(self, tensors: Iterable[Tensor]) -> list[Entry]:
        """The frozen tensors that have a source among these."""
        entries = {id(entry): entry for x in tensors for entry in self._entries.get(x, ())}
        return [entry for entry in entries.values() if entry.is_alive]

    def is_releasable(self, x: Tensor) -> bool:
        """Whether `x` was frozen, and no compiled graph reads `x` itself, or anything else in its memory."""
        if x not in self._entries or x in self.released or not x.is_floating_point():  # a NaN takes its place
            return False
        with self._lock:
            memory = StorageWeakRef(x.untyped_storage())
            return not any(memory in graph.memory for graph in self._graphs)


STORE = Store()
"""That of this process."""


def nan_placeholder(x: Tensor, device: torch.device | str) -> Tensor:
    """What takes the place of a parameter's values when it is released, for a graph of another backend to read.

    All its values are a single NaN. Of several experts' weights one weight stays: whoever traces torch's grouped matmul
    has to find the strides of one.
    """
    expert = x.shape[-2:] if x.dim() > 2 else (1,) * x.dim()
    shape = (1,) * (x.dim() - len(expert)) + tuple(expert)
    return torch.full(shape, torch.nan, dtype=x.dtype, device=device).expand(x.shape)
