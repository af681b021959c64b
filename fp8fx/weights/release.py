"""release and restore: the memory of the original weights."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from fp8fx.errors import FreezeError
from fp8fx.torch_internals import is_compiling, is_exporting
from fp8fx.weights.refresh import entries_of, refresh
from fp8fx.weights.state_dicts import kind_of, kind_text, state_of, uncompiled, without_wrapper
from fp8fx.weights.store import STORE, nan_placeholder

__all__ = ["release", "restore"]

_METADATA = {
    *("data_ptr", "dim", "element_size", "get_device", "is_complex", "is_contiguous", "is_floating_point"),
    *("is_inference", "ndimension", "nelement", "numel", "requires_grad_", "size", "storage_offset", "stride"),
    *("untyped_storage", "__hash__", "__len__"),
}
"""Functions and methods that read no values."""

_VALUES = {"H", "T", "data", "imag", "mH", "mT", "real"}
"""Attributes that read values."""

_SETTABLE = {"grad", "requires_grad"}
"""Attributes that can be set without values."""


class _Released(Parameter):
    """A parameter whose memory has been freed: shape, dtype and device are there; reading its values is a FreezeError.

    Dynamo traces it as it is, since a graph that is being compiled may have its frozen tensors. One that is being
    exported has none.
    """

    def __new__(cls) -> _Released:
        raise TypeError("parameters become released by fp8fx.release(model)")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"released {kind_text(kind_of(self))}"

    def __deepcopy__(self, memo: object) -> NoReturn:
        self._refuse("copied")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        self._refuse("saved")

    @staticmethod
    def _refuse(what: str) -> NoReturn:
        raise FreezeError(
            f"a parameter that has been released is {what}; fp8fx.restore(model, state_dict) brings its values back"
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        access = func.__name__ if func.__name__ in ("__get__", "__set__") else None
        name = func.__self__.__name__ if access else func.__name__
        without_values = _SETTABLE if access else _METADATA
        is_metadata = name not in _VALUES if access == "__get__" else name in without_values
        if not is_metadata and is_exporting():
            cls._refuse("exported")
        if not is_metadata and not is_compiling():
            verb = "changed" if access == "__set__" else "read"
            cls._refuse(f"{verb} by {name} outside a compiled graph, as where Dynamo has reached a recompile limit")
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


def _touch(module: nn.Module) -> None:
    """Assigns the module's parameters to it again, each under its own name.

    Dynamo of torch 2.11 does not look at a tensor whose module was not written to (pytorch/pytorch#163064).
    """
    for name, x in list(module._parameters.items()):
        module._parameters[name] = None  # writing the same value again would not count
        module._parameters[name] = x


def _free(x: Parameter) -> int:
    """Returns how many bytes it frees."""
    STORE.released[x] = type(x)
    freed = x.nbytes
    with torch.inference_mode(x.is_inference()):
        x.data = nan_placeholder(x, x.device)
    x.__class__ = _Released
    return freed - x.untyped_storage().nbytes() if x.dim() > 2 else freed


def _fill(x: Parameter, values: Tensor) -> None:
    x.__class__ = STORE.released.pop(x)
    with torch.inference_mode(x.is_inference()):
        x.data = torch.empty_like(x, memory_format=torch.contiguous_format).copy_(values.detach())


def _released(module: nn.Module, prefix: str) -> list[str]:
    """The names of the module's own released parameters."""
    return [prefix + name for name, x in module._parameters.items() if isinstance(x, _Released)]


def _refuse_save(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    if names := ", ".join(_released(module, prefix)):
        raise FreezeError(
            f"{names}: released, so there is nothing to save; fp8fx.restore(model, state_dict) brings the values back"
        )


def _refuse_load(module: nn.Module, state_dict: Any, prefix: str, *_: Any) -> None:
    if names := ", ".join(_released(module, prefix)):
        raise FreezeError(
            f"{names}: released, so there is nowhere to load to; fp8fx.refresh(model, state_dict) re-quantizes, "
            "fp8fx.restore(model, state_dict) also brings the originals back"
        )


def release(model: nn.Module) -> int:
    """Frees the original weights of a model compiled with `options={"freeze": True}`; returns how many bytes they had.

    What a compiled graph reads in high precision stays, such as a weight that is tied to an embedding. First call the
    model with every kind of input that it will get: a graph that is compiled later and needs a released weight raises
    FreezeError. The next call compiles once more. Of several experts' weights in one parameter as much stays as one
    expert has.

    A released parameter keeps name, shape, dtype and device. Until `restore`, FreezeError is raised if its values are
    read, such as in a call that Dynamo does not compile, and if the model is saved, loaded, copied, exported or moved.

    Raises:
        GraphError: `model` is no nn.Module.
        FreezeError: nothing of the model is frozen.

    >>> model = torch.nn.Linear(64, 32).requires_grad_(False)
    >>> compiled = torch.compile(model, backend="fp8", options={"freeze": True})
    >>> y = compiled(torch.ones(8, 64))
    >>> release(model)
    8192
    >>> torch.equal(compiled(torch.ones(8, 64)), y)
    True
    """
    model = uncompiled(model, "release")
    entries_of(model)
    # Graphs that torch._dynamo.reset() has dropped, or a model compiled before, hold each other and read nothing.
    gc.collect()
    freed = 0
    for module in model.modules():
        parameters = {id(x): x for x in module._parameters.values() if x is not None}  # one may have two names
        tied = any(x in STORE.released for x in parameters.values())  # another module's was released, and is this one's
        releasable = [x for x in parameters.values() if STORE.is_releasable(x)]
        freed += sum(map(_free, releasable))
        if not releasable and not tied:
            continue
        _touch(module)
        if _refuse_save not in module._state_dict_pre_hooks.values():
            module.register_state_dict_pre_hook(_refuse_save)
            module.register_load_state_dict_pre_hook(_refuse_load)
    return freed


def restore(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Gives a released model its original weights back, from the state dict of the model as it was or has become.

    The frozen weights are made anew of these too, so that both agree. The next call compiles once more.

    Raises:
        GraphError: `model` is no nn.Module.
        FreezeError: as `refresh`.

    >>> model = torch.nn.Linear(64, 32).requires_grad_(False)
    >>> state = {name: x.clone() for name, x in model.state_dict().items()}
    >>> y = torch.compile(model, backend="fp8", options={"freeze": True})(torch.ones(8, 64))
    >>> release(model)
    8192
    >>> restore(model, state)
    >>> torch.equal(model.weight, state["weight"])
    True
    """
    model = uncompiled(model, "restore")
    values = without_wrapper(state_dict)
    refresh(model, values)
    modules = [module for module in model.modules() if _released(module, "")]
    for name, x in state_of(model).items():
        if isinstance(x, _Released):
            _fill(x, values[name])
    for module in modules:
        _touch(module)
