"""What a linear of a graph is, once recognised: a type per kind. And a matmul that is left alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fp8fx.graph.values import fake
from fp8fx.linears.form import Form
from fp8fx.linears.views import NONE, Views, apply
from fp8fx.ops.fp8_weight import FP8Weight
from fp8fx.reasons import Because

__all__ = ["GroupedMatch", "LinearMatch", "MatmulMatch", "ModuleMatch", "Refusal", "Size"]

Size = int | torch.SymInt | None
"""A size of a matmul: symbolic if the graph's is, None if it is not known."""


@dataclass(frozen=True, kw_only=True)
class LinearMatch:
    """`input @ weight`, however it is written: what its kinds have in common.

    Attributes:
        node: the node whose value it is.
        form: how it is written.
        spelling: the same for people to read, such as `F.linear`.
        path: the path of the module it stands in.
        name: the name of the parameter, buffer or constant behind the weight.
        input: (*, K), after `views`.
        tensor: the weight's value, real or fake, before `views`.
        m: how many rows the input has, (*) multiplied.
        k: how many values are summed for each of the result.
        n: how many columns the result has.
        views: how the graph's input, weight and result are seen. A bias is added to the result as it is seen.
        transposed: whether the weight, after `views`, is (N, K) and not (K, N).
    """

    node: fx.Node
    form: Form
    spelling: str
    path: str
    name: str
    input: fx.Node
    tensor: Tensor
    m: Size
    k: int
    n: int
    views: Views = NONE
    transposed: bool = False

    @property
    def x(self) -> Tensor | None:
        """The input's value as it is seen, (*, K); None if it is not known."""
        input_value = fake(self.input)
        return None if input_value is None else apply(input_value, self.views.input)

    @property
    def own_recipe(self) -> str | None:
        """The recipe of a weight that is FP8 already."""
        return self.tensor.recipe if isinstance(self.tensor, FP8Weight) else None

    def refused(self, reason: Because) -> Refusal:
        """The linear, left alone for this reason."""
        return Refusal(
            node=self.node,
            spelling=self.spelling,
            reason=reason,
            path=self.path,
            name=self.name,
            m=self.m,
            k=self.k,
            n=self.n,
        )


@dataclass(frozen=True, kw_only=True)
class MatmulMatch(LinearMatch):
    """A call of a function: `alpha * (input @ weight) + beta * bias`.

    Attributes:
        weight: the weight's node.
        bias: the addend's node, of any shape that broadcasts to (*, N); None for none.
        alpha: what the product is multiplied by, as addmm's.
        beta: what the addend is multiplied by, as addmm's.
    """

    weight: fx.Node
    bias: fx.Node | None = None
    alpha: float = 1
    beta: float = 1


@dataclass(frozen=True, kw_only=True)
class ModuleMatch(LinearMatch):
    """A call of an nn.Linear, or of a convolution of size 1, as a module that holds its weight and bias.

    Attributes:
        module: the module's path, as the node's target has it.
        has_bias: whether the module has a bias, (N,).
    """

    module: str
    has_bias: bool


@dataclass(frozen=True, kw_only=True)
class GroupedMatch(LinearMatch):
    """Rows of several experts, each times a weight of its own: K and N are those of one weight.

    Attributes:
        weight: the node of the weights, (E, K, N).
        offs: where the rows of each expert end, (E,), if the input is (M, K); None if it is (E, M / E, K).
    """

    weight: fx.Node
    offs: fx.Node | None = None


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A linear, or another matmul, that is left alone.

    Attributes:
        node: the matmul's node.
        spelling: how it is written, for people to read.
        reason: why.
        path: the path of the module it stands in.
        name: the name of the weight; empty if there is none.
        m, k, n: the sizes of the matmul; None if they are not known.
    """

    node: fx.Node
    spelling: str
    reason: Because
    path: str = ""
    name: str = ""
    m: Size = None
    k: Size = None
    n: Size = None
