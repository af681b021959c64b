"""Weights quantized once: how each is made of the model's own, so that it can be made again, and who holds it.

A converted GraphModule holds its frozen tensors as buffers and forgets the originals. Models behind torch.compile keep their parameters,
which Dynamo passes to every call; the graphs compiled for a model share the frozen tensors through `STORE`, and `release` frees the
originals.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, fx, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from fp8fx.config import Gemm
from fp8fx.errors import FreezeError, GraphError
from fp8fx.formats import LADDER
from fp8fx.graph import attribute, storage
from fp8fx.grouped import quantize_weights
from fp8fx.numerics import quantize
from fp8fx.torch_internals import is_compiling, is_exporting, make_fx

__all__ = ["META", "STORE", "Account", "Frozen", "FrozenModule", "refresh", "release", "restore", "stand_in", "view_key"]

META = "fp8fx_frozen"
"""In the meta of a converted GraphModule: its Account."""


def view_key(build: Callable[..., Tensor], kind: tuple[torch.Size, torch.dtype]) -> Hashable:
    """Equal for all ways to see the same part of a tensor of this shape and dtype; None if `build` does more than see it."""
    shape, dtype = kind
    whole = torch.empty(shape, dtype=dtype, device="meta")
    try:
        seen = build(whole)
    except RuntimeError:  # nothing that works without values
        return None
    if storage(seen) != storage(whole):
        return None
    strides = tuple(0 if size == 1 else stride for size, stride in zip(seen.shape, seen.stride(), strict=True))
    return seen.dtype, seen.storage_offset(), seen.shape, strides, seen.is_conj(), seen.is_neg()


@dataclass(frozen=True)
class Frozen:
    """One frozen tensor.

    Attributes:
        sources: the names of the tensors that it is made of, as the model's state dict has them.
        build: a graph of these, in this order: a weight (K, N), one for each of several experts (E, K, N), or a merged bias (N,).
        gemm: what the weight is the second operand of; None for a bias, which is not quantized.
        buffers: the names of the buffers that hold it: FP8 data (N, K) or (E, N, K) and scale, or the bias. A GEMM with a scale for each
            row of its first operand takes one for each row of the second, so that a scale per tensor is held N times, (N, 1).
    """

    sources: tuple[str, ...]
    build: fx.GraphModule
    gemm: Gemm | None
    buffers: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, Gemm | None]:
        """What else than its sources tells it from others."""
        return self.build.code, self.gemm

    def traced(self, kinds: Sequence[tuple[torch.Size, torch.dtype]]) -> str:
        """The code of `build` in ATen's operators, of sources of these kinds: Dynamo calls others on a parameter that has been released."""
        sources = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in kinds]
        traced: Any = make_fx(lambda *given: self.built(given))(*sources)
        return str(traced.code)

    def part(self, kinds: Sequence[tuple[torch.Size, torch.dtype]]) -> Hashable:
        """`view_key` of what is seen of the one source; None if it is more than a view of one."""
        return view_key(self.build, kinds[0]) if len(kinds) == 1 else None

    def built(self, tensors: Sequence[Tensor]) -> Tensor:
        """What `build` gives of the sources' values; a call's autocast, which may be on while it is compiled, is none of the weight's."""
        # What is made in inference mode could not be changed outside it.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            made: Tensor = self.build(*tensors)
        return made

    def make(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What the buffers hold, of the sources' values.

        Raises:
            FreezeError: a value is not finite.
        """
        made = self.built(tensors)
        with torch.inference_mode(False), torch.no_grad():
            if self.gemm is None:
                return (made.clone(),)
            if made.dim() == 2:
                data, scale = quantize(made.t(), self.gemm.rhs, LADDER[-1])
                assert scale is not None
                scale = scale if self.gemm.lhs.granularity == "tensor" else scale.expand(len(data), 1).contiguous()
            else:
                data, scale = quantize_weights(made.transpose(-2, -1), self.gemm.rhs, quantize)
            data = data.contiguous()
        assert scale is not None
        if scale.device.type != "meta" and not bool(scale.isfinite().all()):
            raise FreezeError(f"{', '.join(self.sources)}: inf or NaN in a weight that was to be frozen; expected finite weights")
        return data, scale


@dataclass
class Account:
    """What a converted GraphModule has frozen.

    Attributes:
        frozen: each tensor.
        dropped: the originals that it no longer holds: shape and dtype by name.
        constants: what is frozen of tensors that no state dict has, by name.
        names: all that the model knew a frozen tensor by, as an embedding's for a head tied to it: by the name of the source.
    """

    frozen: list[Frozen] = field(default_factory=list)
    dropped: dict[str, tuple[torch.Size, torch.dtype]] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    names: dict[str, tuple[str, ...]] = field(default_factory=dict)


class FrozenModule(fx.GraphModule):
    """A GraphModule that holds frozen tensors. It and every copy of it refuse the state dict of the model as it was before freezing.

    A class of its own, not a hook: fx's pickles and shallow copies have no hooks, nor do pickles have its meta.
    """

    @classmethod
    def of(cls, gm: fx.GraphModule) -> FrozenModule:
        """Takes the place of `gm`, whose meta has an Account."""
        for node in gm.graph.nodes:
            if isinstance(node.type, str):  # an annotation under `from __future__ import annotations`, which fx cannot pickle
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


_COMPILED = "_orig_mod."


def _text(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')}{tuple(shape)}"


@dataclass
class _Entry:
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
        return len(tensors) == len(self.sources) and all(reference() is x for reference, x in zip(self.sources, tensors, strict=True))

    def check(self, tensors: Sequence[Tensor]) -> None:
        """Raises FreezeError where a source has another shape or dtype than when it was frozen."""
        for name, kind, x in zip(self.frozen.sources, self.kinds, tensors, strict=True):
            if kind != (x.shape, x.dtype):
                raise FreezeError(
                    f"{name} was frozen as {_text(*kind)} and is now {_text(x.shape, x.dtype)}; expected it to keep its "
                    "shape and dtype: build and compile the model anew"
                )


class Reader:
    """Stands for a compiled graph in the store, which knows by it whether that is still there.

    Attributes:
        memory: what the graph reads as it is. Not the parameters: `torch.utils.swap_tensors` refuses one that has a weak reference.
    """

    def __init__(self) -> None:
        self.memory: set[StorageWeakRef] = set()

    @classmethod
    def of(cls, gm: fx.GraphModule) -> Reader:
        """The graph's own."""
        reader: Reader = gm.meta.setdefault("fp8fx_reader", cls())
        return reader


class Store:
    """The frozen tensors of the models behind torch.compile. They live as long as their parameters."""

    def __init__(self) -> None:
        self._entries: Any = WeakTensorKeyDictionary()  # by every source
        self._readers: weakref.WeakSet[Reader] = weakref.WeakSet()
        self._amax: Any = WeakTensorKeyDictionary()
        self._lasting: list[Reader] = []
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
            entry: _Entry
            for entry in self._entries.get(tensors[0], ()):
                if not entry.made_of(tensors) or not self._equal(entry, frozen, tensors):
                    continue
                entry.check(tensors)
                if entry.buffers[0].device == tensors[0].device:
                    if not any(x in self.released for x in tensors):
                        _copy_all(zip(entry.buffers, frozen.make(tensors), strict=True))
                    return tuple(entry.buffers)
            for name, x in zip(frozen.sources, tensors, strict=True):
                self.check_present(name, x)
            kinds = [(x.shape, x.dtype) for x in tensors]
            entry = _Entry(frozen, [TensorWeakRef(x) for x in tensors], kinds, frozen.make(tensors))
            for x in tensors:
                self._entries[x] = [*(one for one in self._entries.get(x, ()) if one.is_alive), entry]
            return entry.buffers

    def _equal(self, entry: _Entry, frozen: Frozen, tensors: Sequence[Tensor]) -> bool:
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
            raise FreezeError(f"{name} has been released, and a graph needs its value; fp8fx.restore(model, state_dict) brings it back")

    def keep(self, name: str, x: Tensor, reader: Reader) -> None:
        """The graph that is being compiled reads `x` as it is.

        Raises:
            FreezeError: it has been released.
        """
        self.check_present(name, x)
        with self._lock:
            self._readers.add(reader)
            if storage(x) is not None:  # otherwise it is none that could be frozen
                reader.memory.add(StorageWeakRef(x.untyped_storage()))

    def bind(self, reader: Reader, compiled: Any) -> None:
        """What `reader` stands for is compiled to `compiled`, and read for as long as that is there."""
        try:
            compiled.fp8fx_reader = reader
        except AttributeError:  # it takes no attributes
            self._lasting.append(reader)

    def entries(self, tensors: Iterable[Tensor]) -> list[_Entry]:
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


def _unwrapped(model: nn.Module, caller: str) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise GraphError(f"{caller} got a {type(model).__name__}; expected the model, as given to torch.compile or as it came back")
    original: Any = getattr(model, "_orig_mod", model)  # what torch.compile returns holds the model so
    return cast(nn.Module, original)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """What the model's state dict holds; its own way there is closed while weights are released."""
    found: dict[str, Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        own = {**module._parameters, **module._buffers}
        names = (name for name in own if name not in module._non_persistent_buffers_set)
        found |= {f"{prefix}.{name}" if prefix else name: x for name in names if (x := own[name]) is not None}
    return found


def _entries(model: nn.Module) -> list[_Entry]:
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


def _plain(state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """With the names of the model itself, of a state dict of what torch.compile returned."""
    if not isinstance(state_dict, Mapping):
        raise FreezeError(f"the state dict is a {type(state_dict).__name__}; expected a mapping of names to tensors, nothing was changed")
    if not all(name.startswith(_COMPILED) for name in state_dict):
        return state_dict
    return {name.removeprefix(_COMPILED): x for name, x in state_dict.items()}


def _check_state(expected: Mapping[str, tuple[torch.Size, torch.dtype]], given: Mapping[str, Any]) -> None:
    """That `given` has the names, shapes and dtypes of the model before it was frozen; a module's extra state is its own affair."""
    additional = {name for name in given if not name.endswith("_extra_state")} - expected.keys()
    for what, names in (("lacks", expected.keys() - given.keys()), ("has besides", additional)):
        if names:
            shown = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
            raise FreezeError(f"the state dict {what} {shown}; expected that of the model as it was before freezing, nothing was changed")
    for name, kind in expected.items():
        if not isinstance(given[name], Tensor):
            raise FreezeError(f"{name} is a {type(given[name]).__name__} in the state dict; expected {_text(*kind)}, nothing was changed")
        if (found := (given[name].shape, given[name].dtype)) != kind:
            raise FreezeError(f"{name} is {_text(*found)} in the state dict; expected {_text(*kind)}, nothing was changed")
        if given[name].layout != torch.strided or given[name].is_meta:
            what = "on the meta device, without values" if given[name].is_meta else str(given[name].layout).removeprefix("torch.")
            raise FreezeError(f"{name} is {what} in the state dict; expected a dense tensor, nothing was changed")


def _copy_all(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    def memory(x: Tensor) -> tuple[Any, ...]:
        return storage(x), x.storage_offset(), x.stride()

    pairs = [(old, new) for old, new in pairs if memory(old) != memory(new)]
    written = {memory(old)[0] for old, _ in pairs}
    # All values first, where they are other tensors of the same model.
    for old, new in [(old, new.clone() if memory(new)[0] in written else new) for old, new in pairs]:
        with torch.inference_mode(old.is_inference()), torch.no_grad():
            old.copy_(new)


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
    model = _unwrapped(model, "refresh")
    if isinstance(model, FrozenModule):
        _refresh_converted(model, model.meta[META], state_dict)
        return
    own = state_of(model)
    entries = _entries(model)
    new = {id(x): x for x in own.values()}
    if state_dict is None:
        for name, x in own.items():
            STORE.check_present(name, x)
    else:
        state_dict = _plain(state_dict)
        _check_state({name: (x.shape, x.dtype) for name, x in own.items()}, state_dict)
        new = {id(x): state_dict[name] for name, x in own.items()}
    pairs: list[tuple[Tensor, Tensor]] = []
    for entry in entries:
        sources, device = [cast(Tensor, reference()) for reference in entry.sources], entry.buffers[0].device
        if any(id(x) not in new and isinstance(x, Parameter) for x in sources):
            raise FreezeError(f"{', '.join(entry.frozen.sources)} are frozen together and not all in this module; pass the whole model")
        entry.check(sources)
        made = entry.frozen.make([new.get(id(x), x).to(device) for x in sources])  # a tensor that no state dict has is as it is
        pairs += zip(entry.buffers, made, strict=True)
    if state_dict is not None:
        pairs += [(x, state_dict[name]) for name, x in own.items() if x not in STORE.released]
    _copy_all(pairs)


def _refresh_converted(gm: FrozenModule, account: Account, state_dict: Mapping[str, Tensor] | None) -> None:
    if state_dict is None:
        raise FreezeError("a converted model holds no original weights; pass the state dict that has the new ones")
    frozen = {name for one in account.frozen for name in one.buffers}
    own = {name: x for name, x in state_of(gm).items() if name not in frozen}
    _check_state({name: (x.shape, x.dtype) for name, x in own.items()} | account.dropped, state_dict)
    pairs: list[tuple[Tensor, Tensor]] = [(x, state_dict[name]) for name, x in own.items()]
    new = {**account.constants, **state_dict}
    for one in account.frozen:
        buffers = [attribute(gm, name) for name in one.buffers]
        made = one.make([new[name].to(buffers[0].device) for name in one.sources])
        pairs += zip(buffers, made, strict=True)
    _copy_all(pairs)


_METADATA = {"data_ptr", "dim", "element_size", "get_device", "is_complex", "is_contiguous", "is_floating_point", "is_inference"}
_METADATA |= {"ndimension", "nelement", "numel", "requires_grad_", "size", "storage_offset", "stride", "untyped_storage"}
_METADATA |= {"__hash__", "__len__"}
_READS = {"H", "T", "data", "imag", "mH", "mT", "real"}  # attributes
_SETS = {"grad", "requires_grad"}


class _Released(Parameter):
    """A parameter whose memory has been freed: has shape, dtype and device, and raises FreezeError where its values are read.

    Dynamo traces it as it is, since a graph that is being compiled may have its frozen tensors; one that is being exported has not.
    """

    def __new__(cls) -> _Released:
        raise TypeError("parameters become released by fp8fx.release(model)")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"released {_text(self.shape, self.dtype)}"

    def __deepcopy__(self, memo: object) -> NoReturn:
        self._refuse("copied")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        self._refuse("saved")

    @staticmethod
    def _refuse(what: str) -> NoReturn:
        raise FreezeError(f"a parameter that has been released is {what}; fp8fx.restore(model, state_dict) brings its values back")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        access = func.__name__ if func.__name__ in ("__get__", "__set__") else None
        name = func.__self__.__name__ if access else func.__name__
        metadata = name not in _READS if access == "__get__" else name in (_SETS if access else _METADATA)
        if not metadata and is_exporting():
            cls._refuse("exported")
        if not metadata and not is_compiling():
            done = "changed" if access == "__set__" else "read"
            cls._refuse(f"{done} by {name} outside a compiled graph, as where Dynamo has reached a recompile limit")
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


def _touch(module: nn.Module) -> None:
    """Assigns the module's parameters to it again, each under its own name.

    Dynamo of torch 2.11 does not look at a tensor whose module was not written to (pytorch/pytorch#163064).
    """
    for name, x in list(module._parameters.items()):
        module._parameters[name] = None  # writing the same value again would not count
        module._parameters[name] = x


def stand_in(x: Tensor, device: torch.device | str) -> Tensor:
    """What takes the place of a parameter's values when it is released.

    One NaN, in which all its values are, for a graph of another backend. Of several experts' weights one weight of them: whoever traces
    torch's grouped matmul has to find the strides of one.
    """
    kept = (*(1 for _ in x.shape[:-2]), *x.shape[-2:]) if x.dim() > 2 else (1,) * x.dim()
    return torch.full(kept, torch.nan, dtype=x.dtype, device=device).expand(x.shape)


def _free(x: Parameter) -> int:
    """Returns how many bytes it frees."""
    STORE.released[x] = type(x)
    with torch.inference_mode(x.is_inference()):
        freed, x.data = x.nbytes, stand_in(x, x.device)
    x.__class__ = _Released
    if x.dim() > 2:
        freed -= x.untyped_storage().nbytes()
    return freed


def _fill(x: Parameter, values: Tensor) -> None:
    x.__class__ = STORE.released.pop(x)
    with torch.inference_mode(x.is_inference()):
        x.data = torch.empty_like(x, memory_format=torch.contiguous_format).copy_(values.detach())


def _released(module: nn.Module, prefix: str) -> list[str]:
    """The names of the module's own released parameters."""
    return [prefix + name for name, x in module._parameters.items() if isinstance(x, _Released)]


def _refuse_save(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    if names := _released(module, prefix):
        raise FreezeError(
            f"{', '.join(names)}: released, so there is nothing to save; fp8fx.restore(model, state_dict) brings the values back"
        )


def _refuse_load(module: nn.Module, state_dict: Any, prefix: str, *_: Any) -> None:
    if names := _released(module, prefix):
        raise FreezeError(
            f"{', '.join(names)}: released, so there is nowhere to load to; fp8fx.refresh(model, state_dict) re-quantizes, "
            "fp8fx.restore(model, state_dict) also brings the originals back"
        )


def release(model: nn.Module) -> int:
    """Frees the original weights of a model compiled with `options={"freeze": True}`; returns how many bytes they had.

    What a compiled graph reads in high precision stays, as a weight tied to an embedding; call the model before with every kind of input
    that it will get, since a graph that is compiled later and needs a released weight raises FreezeError. The next call compiles once more.
    Of several experts' weights in one parameter as much stays as one expert has. A released parameter keeps name, shape, dtype and device.
    Until `restore` FreezeError is raised where its values are read, as in a call that Dynamo does not compile, and where the model is
    saved, loaded, copied, exported or moved.

    Raises:
        GraphError: `model` is no nn.Module.
        FreezeError: nothing of the model is frozen.
    """
    model = _unwrapped(model, "release")
    _entries(model)
    gc.collect()  # graphs that torch._dynamo.reset() has dropped, or a model compiled before, hold each other and read nothing any more
    freed = 0
    for module in model.modules():
        ours = list({id(x): x for x in module._parameters.values() if x is not None and STORE.releasable(x)}.values())  # of two names too
        shared = [x for x in module._parameters.values() if x is not None and x in STORE.released]  # tied: another module's is this one's
        for x in ours:
            freed += _free(x)
        if not ours and not shared:
            continue
        _touch(module)
        if _refuse_save not in module._state_dict_pre_hooks.values():
            module.register_state_dict_pre_hook(_refuse_save)
            module.register_load_state_dict_pre_hook(_refuse_load)
    return freed


def restore(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Gives a released model its original weights back, from the state dict of the model as it was or has become since.

    The frozen weights are made anew of them too, so that both agree. The next call compiles once more.

    Raises:
        GraphError: `model` is no nn.Module.
        FreezeError: as `refresh`.
    """
    model = _unwrapped(model, "restore")
    state_dict = _plain(state_dict)
    refresh(model, state_dict)
    modules = [module for module in model.modules() if _released(module, "")]
    for name, x in state_of(model).items():
        if isinstance(x, _Released):
            _fill(x, state_dict[name])
    for module in modules:
        _touch(module)
