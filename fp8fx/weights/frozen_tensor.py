"""A weight that is quantized beforehand: how it is made of the model's own tensors, so that it can be made again."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fp8fx.errors import FreezeError
from fp8fx.graph.values import storage
from fp8fx.recipes.formats import LADDER
from fp8fx.recipes.quantize import Quantized, quantize, quantize_experts
from fp8fx.recipes.recipe import Gemm
from fp8fx.weights.state_dicts import Kind

__all__ = ["Frozen", "view_key"]


def view_key(build: Callable[..., Tensor], kind: Kind) -> Hashable:
    """Equal for all ways to see the same part of a tensor of this kind; None if `build` does more than see it."""
    shape, dtype = kind
    whole = torch.empty(shape, dtype=dtype, device="meta")
    try:
        view = build(whole)
    except RuntimeError:  # it does not work without values
        return None
    if storage(view) != storage(whole):
        return None
    strides = tuple(0 if size == 1 else stride for size, stride in zip(view.shape, view.stride(), strict=True))
    return view.dtype, view.storage_offset(), view.shape, strides, view.is_conj(), view.is_neg()


def _quantized(weight: Tensor, gemm: Gemm) -> Quantized:
    """A weight (K, N), or (E, K, N) of several experts, as the second operand of a GEMM: (N, K) or (E, N, K)."""
    if weight.dim() == 3:
        return quantize_experts(weight.transpose(-2, -1), gemm.rhs, quantize)
    data, scale = quantize(weight.t(), gemm.rhs, LADDER[-1])
    assert scale is not None
    if gemm.lhs.granularity != "tensor":
        scale = scale.expand(len(data), 1).contiguous()
    return Quantized(data, scale)


@dataclass(frozen=True)
class Frozen:
    """A frozen tensor.

    Attributes:
        sources: the names of the tensors that it is made of, as the model's state dict has them.
        build: a graph of these, in this order: a weight (K, N), one for each of several experts (E, K, N), or a merged
            bias (N,).
        gemm: what the weight is the second operand of; None for a bias, which is not quantized.
    """

    sources: tuple[str, ...]
    build: fx.GraphModule
    gemm: Gemm | None

    @property
    def key(self) -> tuple[str, Gemm | None]:
        """What tells it from others of the same sources."""
        return self.build.code, self.gemm

    def part(self, kinds: Sequence[Kind]) -> Hashable:
        """`view_key` of what it sees of its only source; None if it is more than a view of one."""
        return view_key(self.build, kinds[0]) if len(kinds) == 1 else None

    def value(self, tensors: Sequence[Tensor]) -> Tensor:
        """What `build` gives of the sources' values.

        It runs with autocast off: the caller's settings must not affect the weight. It runs outside inference mode,
        since what is made there could not be changed later.
        """
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast("cuda", enabled=False),
            torch.autocast("cpu", enabled=False),
        ):
            value: Tensor = self.build(*tensors)
        return value

    def make(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """FP8 data (N, K) or (E, N, K) and scale, or the bias, of the sources' values.

        A GEMM with a scale for each row of its first operand takes one for each row of the second, so that a scale per
        tensor is repeated N times, (N, 1).

        Raises:
            FreezeError: a value is not finite.
        """
        value = self.value(tensors)
        with torch.inference_mode(False), torch.no_grad():
            if self.gemm is None:
                return (value.clone(),)
            data, scale = _quantized(value, self.gemm)
            data = data.contiguous()
        assert scale is not None
        if scale.device.type != "meta" and not bool(scale.isfinite().all()):
            names = ", ".join(self.sources)
            raise FreezeError(f"{names}: inf or NaN in a weight that was to be frozen; expected finite weights")
        return data, scale
