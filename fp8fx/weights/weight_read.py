"""What a linear reads of a parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from fp8fx.graph.constants import expression
from fp8fx.graph.facts import Facts
from fp8fx.linears.matches import GroupedMatch, LinearMatch, MatmulMatch
from fp8fx.linears.views import apply
from fp8fx.ops.fp8_weight import FP8Weight
from fp8fx.weights.frozen_tensor import view_key

__all__ = ["WeightRead"]


@dataclass(frozen=True)
class WeightRead:
    """What a linear reads: a parameter, and the nodes from there to the weight.

    Attributes:
        match: the linear.
        source: the parameter.
        node: its node; None if a module that is called holds it.
        steps: the nodes from there to the weight.
    """

    match: LinearMatch
    source: Tensor
    node: fx.Node | None
    steps: Sequence[fx.Node]

    @classmethod
    def of(cls, match: LinearMatch, facts: Facts) -> WeightRead | None:
        """None unless one parameter is behind the weight."""
        if not isinstance(match, MatmulMatch | GroupedMatch):
            return cls(match, match.tensor, None, ())
        origin = expression(match.weight, facts.constants)
        if origin is None or len(origin[0]) != 1:
            return None
        (node,), steps = origin
        source = facts.tensors.get(node)
        return None if source is None else cls(match, source, node, steps)

    @property
    def can_lie_beside_others(self) -> bool:
        """Whether it can be merged: of a weight that is FP8 already, if it is t() of the whole, an input (N, K)."""
        if self.match.own_recipe is None:
            return True
        if self.node is None or self.node.op != "placeholder" or not isinstance(self.source, FP8Weight):
            return False
        # A square weight (N, K) has the shape of one that is read the other way round.
        kind = self.source.shape, self.source.dtype
        return not self.source.is_transposed and view_key(self.operand, kind) == view_key(Tensor.t, kind)

    @property
    def amax(self) -> float:
        """The weight's largest magnitude; 0 on the meta device."""
        return 0.0 if self.source.is_meta else float(self.part(self.source.detach()).abs().amax())

    @property
    def key(self) -> Any:
        """Equal for linears that read the same part of the same parameter."""
        if (part := view_key(self.operand, (self.source.shape, self.source.dtype))) is not None:
            return id(self.source), part
        steps = ((str(node.target), repr(fx.map_arg((node.args, node.kwargs), lambda _: None))) for node in self.steps)
        return id(self.source), self.match.transposed, repr(self.match.views.weight), *steps

    def operand(self, x: Tensor) -> Tensor:
        """The right operand, (K, N)."""
        weight = apply(self.part(x), self.match.views.weight)
        return weight.mT if self.match.transposed else weight

    def part(self, x: Tensor) -> Tensor:
        """What the linear reads of the parameter's value."""
        values = {self.node: x}
        result = x
        for node in self.steps:
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            call: Any = getattr(Tensor, str(node.target)) if node.op == "call_method" else node.target
            result = values[node] = call(*args, **kwargs)
        return result
