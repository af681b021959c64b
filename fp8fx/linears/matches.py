"""What a linear of a graph is, once recognised; and a matmul that is left alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fp8fx.graph.values import fake
from fp8fx.linears.views import NONE, Views, apply

__all__ = ["LinearMatch", "Refusal", "Size"]

Size = int | torch.SymInt | None


@dataclass(frozen=True)
class LinearMatch:
    """`alpha * (input @ weight) + beta * bias`, one way of writing it.

    Attributes:
        node: the node whose value it is.
        form: how it is written, as `F.linear`.
        path: the module it stands in.
        name: the name of the parameter, buffer or constant behind `weight`.
        input: (*, K), after `views`.
        weight: (N, K) where `transposed`, else (K, N), after `views`; None for a module called as a whole.
        module: the target of an nn.Linear called as a module, which holds weight and bias; else None.
        transposed: whether `weight` must be transposed to be the right operand.
        bias: the addend, of any shape that broadcasts to (*, N); None for none.
        alpha, beta: scalars, as addmm's.
        views: how the graph's input, weight and result are seen; a bias is added to the result as it is seen.
        m, k, n: the sizes of the matmul; m is None where it is not known, and may be symbolic.
        tensor: the weight's value, real or fake.
        grouped: whether each of several experts has rows and a weight of its own: the weight is (E, K, N).
        offs: of a grouped matmul whose input is (M, K), where the rows of each expert end; None where the input is (E, M / E, K).
    """

    node: fx.Node
    form: str
    path: str
    name: str
    input: fx.Node
    weight: fx.Node | None
    module: str | None
    transposed: bool
    bias: fx.Node | None
    alpha: float
    beta: float
    m: int | torch.SymInt | None
    k: int
    n: int
    tensor: Tensor
    views: Views = NONE
    grouped: bool = False
    offs: fx.Node | None = None

    @property
    def x(self) -> Tensor | None:
        """The input's value, as it is seen; None where it is not known."""
        known = fake(self.input)
        return None if known is None else apply(known, self.views.input)


@dataclass(frozen=True)
class Refusal:
    """A linear, or another matmul, that is left alone. Attributes as LinearMatch's; sizes are None where not known."""

    node: fx.Node
    form: str
    reason: str
    path: str = ""
    name: str = ""
    m: int | torch.SymInt | None = None
    k: int | torch.SymInt | None = None
    n: int | torch.SymInt | None = None
