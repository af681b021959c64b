"""FP8 weights that a converted module holds in the place of the model's own.

fc.weight (N, K)                  -> fc.weight: FP8Weight (N, K)
fc.weight, which more than linears read, or a part of it, or siblings' weights
                                  -> fc_weight_frozen: FP8Weight (N, K)
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from fp8fx.graph.copies import drop, set_parameter
from fp8fx.graph.values import unused
from fp8fx.weights.converted_module import META, Account, quantized
from fp8fx.weights.frozen_tensor import Frozen, view_key
from fp8fx.weights.saved import check_name_of_scale
from fp8fx.weights.state_dicts import kind_of, state_of

__all__ = ["Operand", "place_weights"]


@dataclass(frozen=True)
class Operand:
    """What an op reads, a weight or merged biases, and the tensors that it is made of."""

    frozen: Frozen
    tensors: Sequence[Tensor]

    @property
    def key(self) -> Any:
        """Equal if the same is frozen, also if a weight is written in two ways."""
        part = self.frozen.part([kind_of(x) for x in self.tensors])
        return tuple(map(id, self.tensors)), self.frozen.build.code if part is None else part, self.frozen.gemm

    @property
    def is_transposed(self) -> bool | None:
        """Whether it is the whole of one tensor (K, N), or of one (N, K); None if it is neither."""
        if len(self.tensors) != 1:
            return None
        kind = kind_of(self.tensors[0])
        part = self.frozen.part([kind])
        if part is None:
            return None
        return {view_key(lambda x: x, kind): True, view_key(lambda x: x.mT, kind): False}.get(part)


def _names(gm: fx.GraphModule) -> dict[int, list[str]]:
    """All names that a module knows a tensor by, by the tensor's id."""
    names: dict[int, list[str]] = {}
    tensors = gm.named_parameters(remove_duplicate=False), gm.named_buffers(remove_duplicate=False)
    for name, x in itertools.chain(*tensors):
        names.setdefault(id(x), []).append(name)
    return names


def place_weights(gm: fx.GraphModule, operands: Sequence[Operand], recipe: str) -> dict[Any, tuple[str, bool]]:
    """Lets a module hold what its ops read in FP8, and forget what its graph no longer reads.

    Returns:
        By `Operand.key` the name that the module has for it, and whether it is a weight (K, N).

    Raises:
        FreezeError: a weight is not finite.
    """
    if not operands:
        return {}
    names, saved = _names(gm), state_of(gm).keys()
    for operand in operands:
        if operand.frozen.gemm is not None:
            for name in operand.frozen.sources:
                check_name_of_scale(name, saved)
    dropped = drop(gm, [x for operand in operands for x in operand.tensors]).keys()
    free = set(dropped)
    places: dict[Any, tuple[str, bool]] = {}
    account = Account()
    for operand in operands:
        if operand.key in places:
            continue
        name, _ = places[operand.key] = _place(gm, operand, recipe, names, free)
        is_in_its_place = (name,) == operand.frozen.sources and name in saved
        if not is_in_its_place or not dropped >= set(names[id(operand.tensors[0])]):
            account.remember(name, operand.frozen, operand.tensors, names, saved)
    gm.meta[META] = gm.meta.get(META, Account()) | account
    return places


def _place(
    gm: fx.GraphModule, operand: Operand, recipe: str, names: dict[int, list[str]], free: set[str]
) -> tuple[str, bool]:
    """Puts what is frozen into a module; returns its name, and whether it is a weight (K, N).

    Args:
        gm: the module.
        operand: what is to be frozen.
        recipe: the name of the recipe that reads it.
        names: all names that the module had for a tensor, by the tensor's id.
        free: those that nothing reads any more.
    """
    source = operand.frozen.sources[0]
    is_transposed = operand.is_transposed
    with torch.inference_mode(False):
        if is_transposed is not None and source in free:
            weight = quantized(operand.frozen, operand.tensors[0], recipe, is_transposed=is_transposed)
            for name in free.intersection(names[id(operand.tensors[0])]):
                set_parameter(gm, name, cast(nn.Parameter, weight))
                free.remove(name)
            return source, is_transposed
        name = unused(gm, re.sub(r"\W", "_", f"{source}_frozen"))
        value = operand.frozen.value(operand.tensors)
        if operand.frozen.gemm is None:
            gm.register_buffer(name, value.clone())
        else:
            weight = quantized(operand.frozen, value.mT, recipe, is_transposed=False)
            gm.register_parameter(name, cast(nn.Parameter, weight))
        return name, False
