"""A weight quantized once: how it is made of the model's own, so that it can be made again."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fp8fx.errors import FreezeError
from fp8fx.graph.values import storage
from fp8fx.ops.grouped_mm import quantize_weights
from fp8fx.recipes.formats import LADDER
from fp8fx.recipes.quantize import quantize
from fp8fx.recipes.recipe import Gemm
from fp8fx.torch_internals import make_fx

__all__ = ["META", "Account", "Frozen", "view_key"]

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
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast("cuda", enabled=False),
            torch.autocast("cpu", enabled=False),
        ):
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
            raise FreezeError(
                f"{', '.join(self.sources)}: inf or NaN in a weight that was to be frozen; expected finite weights"
            )
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
