"""Counts a model's matmul FLOPs by the kernels it calls: a second opinion on the report, which knows what graphs
show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Flops"]

aten = torch.ops.aten
_LEFT = {aten.mm: 0, aten.bmm: 0, aten.mv: 0, aten.dot: 0, aten.addmm: 1, aten.baddbmm: 1, aten.addmv: 1}
"""Which argument is the left operand."""


class Flops(TorchDispatchMode):
    """Counts while it is entered. Fused attention must be off (`sdpa_kernel(SDPBackend.MATH)`), and fused experts.

    Args:
        model: whose parameters and buffers, and what is computed from them alone, are weights.

    Attributes:
        total: 2 M K N of every matmul.
        of_weights: of those with a weight for an operand, so of neither attention's scores nor its values. An outer
            product, as that of rotary frequencies with positions, is no linear and does not count.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.total = self.of_weights = 0
        self._weights: dict[int, Tensor] = {
            self._place(x): x for x in (*model.parameters(), *model.buffers())
        }  # kept: no place is reused

    @staticmethod
    def _place(x: Tensor) -> int:
        return x.untyped_storage().data_ptr()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        at = _LEFT.get(func.overloadpacket)
        if at is not None:
            k = args[at].shape[-1]
            flops, weighted = 2 * out.numel() * k, any(self._place(x) in self._weights for x in args[at : at + 2])
            self.total += flops
            self.of_weights += flops if weighted and k > 1 else 0
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if tensors and all(self._place(x) in self._weights for x in tensors):
            self._weights |= {self._place(x): x for x in tree_leaves(out) if isinstance(x, Tensor)}
        return out
