"""FP8 weights in state dicts: the data under the weight's own name, as a file has it, and the scale beside it.

    fc.weight: FP8Weight (N, K)    <->    fc.weight: float8 (N, K), fc.weight_scale: float32 (N, 1)

A state dict in high precision loads too: its values are quantized.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from fp8fx.errors import FreezeError
from fp8fx.ops.fp8_weight import FP8Weight
from fp8fx.ops.operands import DTYPES
from fp8fx.torch_internals import DisableTorchFunctionSubclass

__all__ = ["SCALE", "SavedWeight", "attach", "check_name_of_scale", "is_fp8", "joined", "what_is_wrong"]

SCALE = "_scale"
"""What the name of a weight's scale ends in."""

_META = "fp8fx"
"""In a state dict's metadata: the recipes of a module's weights, by their names."""


class SavedWeight(Tensor):
    """The data of an FP8 weight in a state dict: a float8 tensor that knows its scale.

    A copy or a move of it knows it too; `to` a wider dtype gives the FP8 weight. So code that loads a state dict tensor
    by tensor, such as accelerate's offloading, gets the weight and not its codes. It is saved as a plain tensor.
    """

    weight: FP8Weight

    @classmethod
    def of(cls, weight: FP8Weight) -> SavedWeight:
        """That of a weight; it shares the weight's memory if that is contiguous, and the weight's alone."""
        saved: SavedWeight = _alone(weight.qdata).as_subclass(cls)
        saved.weight = weight
        return saved

    def __deepcopy__(self, memo: Any) -> SavedWeight:
        return SavedWeight.of(self.weight.clone())  # type: ignore[arg-type]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _KEEP and isinstance(args[0], SavedWeight):
            weight = func(args[0].weight, *args[1:], **kwargs)
            dtypes = [x for x in (*args[1:], *kwargs.values()) if isinstance(x, torch.dtype)]
            return weight if dtypes else SavedWeight.of(weight)
        if func in _CASTS:
            raise FreezeError(
                f"the data of an FP8 weight was cast by {func.__name__} apart from its scale; weight.dequantize() of "
                "the model has the values, data.as_subclass(torch.Tensor) is the data as a plain tensor"
            )
        if func is Tensor.view and torch.int8 in args:
            raise FreezeError(
                "the data of an FP8 weight was to be read as int8, without its scale, as by disk_offload of "
                "accelerate; use cpu_offload, or save the state dict by safetensors or torch.save"
            )
        with DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


def _alone(x: Tensor) -> Tensor:
    """The tensor contiguous and in memory of its own: files refuse a part of what siblings have side by side."""
    x = x.detach()
    is_alone = x.untyped_storage().nbytes() == x.nbytes
    return x.contiguous() if is_alone else x.clone(memory_format=torch.contiguous_format)


_KEEP = {Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.clone, Tensor.detach, Tensor.contiguous}
_CASTS = {Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16}


def _own(module: nn.Module) -> Iterator[tuple[str, FP8Weight]]:
    for name, x in module._parameters.items():
        if isinstance(x, FP8Weight):
            yield name, x


def attach(root: nn.Module) -> None:
    """Lets the modules below `root` save and load their FP8 weights in this form."""
    for module in root.modules():
        if module is not root and not any(_own(module)):
            continue
        if _save not in module._state_dict_hooks.values():
            module.register_state_dict_post_hook(_save)
            module.register_load_state_dict_pre_hook(_load)


def _save(module: nn.Module, state_dict: MutableMapping[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    for name, _ in _own(module):
        weight = state_dict.get(prefix + name)
        if isinstance(weight, FP8Weight) and not isinstance(weight, nn.Parameter):  # one is, with keep_vars
            state_dict[prefix + name] = SavedWeight.of(weight)
            state_dict[prefix + name + SCALE] = _alone(weight.scale)
            metadata.setdefault(_META, {})[name] = weight.recipe


def _load(module: nn.Module, state_dict: Any, prefix: str, metadata: dict[str, Any], strict: bool, *_: Any) -> None:
    _check(module, state_dict, prefix)
    is_assigned = metadata.get("assign_to_params_buffers", False)
    for name, weight in _own(module):
        key = prefix + name
        scale = state_dict.pop(key + SCALE, None)
        value = state_dict.get(key)
        if scale is not None:
            state_dict[key] = joined(weight, value, scale)
        elif value is not None and is_assigned and not isinstance(value, FP8Weight):
            value = value if value.dtype in DTYPES else value.to(weight.dtype)
            state_dict[key] = FP8Weight(value, weight.recipe, transposed=weight.is_transposed)


def joined(weight: FP8Weight, data: Tensor, scale: Tensor) -> FP8Weight:
    """The weight of a state dict's data and scale, laid out as `weight`."""
    data = data.as_subclass(Tensor)
    if weight.is_transposed:
        data = data.mT.contiguous().mT
    return weight.like(data, scale.expand(weight.scale.shape).contiguous())


def _check(module: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> None:
    """Checks what the state dict has of all FP8 weights below `module`, before anything is loaded.

    A weight of which it has nothing is torch's to report, which alone knows whether it loads strictly: a state dict of
    adapters has none.

    Raises:
        FreezeError: data without a scale, or a scale without data; another shape, dtype or recipe; a value or a scale
            that is not finite.
    """
    recipes = getattr(state_dict, "_metadata", None) or {}
    for path, owner in module.named_modules():
        inner = f"{prefix}{path}." if path else prefix
        for name, weight in _own(owner):
            saved_as = recipes.get(inner[:-1], {}).get(_META, {}).get(name, weight.recipe)
            value, scale = state_dict.get(inner + name), state_dict.get(inner + name + SCALE)
            if value is None and scale is None:
                continue
            why = what_is_wrong(weight, value, scale, saved_as)
            if why is not None:
                raise FreezeError(f"{inner + name}: {why}; nothing was loaded")
        for name, x in (*owner._parameters.items(), *owner._buffers.items()):
            value = state_dict.get(inner + name)
            is_plain = isinstance(x, Tensor) and not isinstance(x, FP8Weight) and not is_fp8(x)
            if is_plain and isinstance(value, Tensor) and is_fp8(value):
                raise FreezeError(
                    f"{inner + name}: FP8 data for a tensor that is {x.dtype} here; freeze this model as the one that "
                    "was saved; nothing was loaded"
                )


def is_fp8(x: Tensor) -> bool:
    """Whether it is a float8 tensor, not an FP8 weight."""
    return x.is_floating_point() and x.dtype.itemsize == 1


def check_name_of_scale(name: str, others: Container[str]) -> None:
    """Raises FreezeError if the model has a tensor of its own where the scale of this weight would be saved."""
    if name + SCALE in others:
        raise FreezeError(
            f"the model has {name + SCALE}, under which the scale of {name} would be saved; rename it, or leave "
            f"{name} in high precision: exclude={name!r}. Nothing was changed"
        )


def what_is_wrong(weight: FP8Weight, value: Any, scale: Any, saved_as: str) -> str | None:
    """Why data and scale, or a value in high precision, cannot be what a weight is loaded from; None if they can."""
    if isinstance(value, FP8Weight):
        return None
    if value is None:
        return "missing in the state dict" if scale is None else "a scale without data"
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__} in the state dict; expected a tensor"
    if saved_as != weight.recipe:
        return f"saved by recipe {saved_as!r}; expected {weight.recipe!r}, by which this model is frozen"
    if value.shape != weight.shape:
        return f"{tuple(value.shape)} in the state dict; expected {tuple(weight.shape)}"
    has_codes = is_fp8(value)
    if has_codes != (scale is not None):
        return (
            "FP8 data without a scale" if has_codes else f"{value.dtype} with a scale; expected FP8 data, or no scale"
        )
    if not has_codes:
        return "inf or NaN in the state dict" if not value.is_meta and not bool(value.isfinite().all()) else None
    if value.dtype != weight.qdata.dtype:
        return f"{value.dtype} in the state dict; expected {weight.qdata.dtype}"
    if scale.dtype != torch.float32 or scale.shape not in (weight.scale.shape, torch.Size([]), torch.Size([1])):
        expected = f"float32 {tuple(weight.scale.shape)}"
        return f"its scale is {scale.dtype} {tuple(scale.shape)} in the state dict; expected {expected}"
    if not scale.is_meta and not bool(scale.isfinite().all()):
        return "its scale is not finite"
    return None
