"""The linears of a graph on the scales: what each costs as it stands, and what it would cost in FP8."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass

import torch
from torch import fx

from fp8fx.config import Config
from fp8fx.executors.registry import resolve
from fp8fx.graph.operators import called
from fp8fx.graph.values import fake, traced_size
from fp8fx.linears.matches import GroupedMatch, LinearMatch
from fp8fx.linears.weight_operand import is_view
from fp8fx.ops import grouped_mm as grouped
from fp8fx.profit.choice import Choice, choose, possible, should_merge
from fp8fx.profit.cost_model import Linear, Times
from fp8fx.reasons import Because, WorthReason
from fp8fx.recipes.recipe import GEMMS, RECIPES, Recipe
from fp8fx.torch_internals import HigherOrderOperator

__all__ = ["Weighing"]


def _gemms(match: LinearMatch) -> tuple[str, ...]:
    """The GEMMs that will run: gradients only if autograd will ask for them."""
    x = fake(match.input)
    recording = torch.is_grad_enabled()
    wanted = (True, recording and (x is None or x.requires_grad), recording and match.tensor.requires_grad)
    return tuple(name for name, needed in zip(GEMMS, wanted, strict=True) if needed)


def _dtype(match: LinearMatch) -> torch.dtype:
    """What it is computed in: autocast's."""
    result = fake(match.node)
    return match.tensor.dtype if result is None else result.dtype


def _inputs(node: fx.Node) -> Iterable[fx.Node]:
    return node.all_input_nodes


def _users(node: fx.Node) -> Iterable[fx.Node]:
    return node.users


def _are_fused(nodes: Iterable[fx.Node], opaque: Set[fx.Node], follow: Callable[[fx.Node], Iterable[fx.Node]]) -> bool:
    """Whether all of these are pointwise work or reductions, which a cast joins.

    Looks through a view to the nodes that `follow` gives of it. What is `opaque` is not joined.
    """
    for node in nodes:
        if is_view(node) and _are_fused(follow(node), opaque, follow):
            continue
        if is_view(node) or node.op not in ("call_function", "call_method") or node in opaque:
            return False
        if called(node) == "scaled_dot_product_attention" or isinstance(node.target, HigherOrderOperator):
            return False
    return True


@dataclass(frozen=True)
class Weighing:
    """What the linears of one graph are weighed by.

    Attributes:
        config: what the user asked for.
        times: the times of GEMMs on a device.
        matmuls: the nodes of the graph's matmuls, which no cast joins.
    """

    config: Config
    times: Callable[[torch.device], Times]
    matmuls: Set[fx.Node]

    def _recipe(self, match: LinearMatch) -> Recipe:
        return RECIPES[match.own_recipe or self.config.recipe]

    def _is_always(self, match: LinearMatch) -> bool:
        """Whether nothing is weighed. In high precision a weight that is FP8 would have to be dequantized each time."""
        return self.config.profit == "always" or match.own_recipe is not None

    def _on_tensor_cores(self, match: LinearMatch, *, groups: bool) -> bool:
        device = match.tensor.device
        return device.type != "meta" and resolve(self.config.executor, device, groups=groups).tensor_cores

    def why_experts_stay(self, match: LinearMatch, is_frozen: bool) -> Because | None:
        """Why the weights of several experts stay in high precision; None if they do not, or it is but one weight.

        Few rows read each of them, so that it takes longer to quantize them than to compute all the GEMMs.
        """
        if (
            not isinstance(match, GroupedMatch)
            or self._is_always(match)
            or not self._on_tensor_cores(match, groups=False)
        ):
            return None
        if not self._on_tensor_cores(match, groups=True):
            return WorthReason.NO_GROUPED_KERNEL()
        if is_frozen:
            return None
        return WorthReason.EXPERTS_EACH_CALL() if self.config.freeze else WorthReason.EXPERTS_NOT_FROZEN()

    def should_merge(
        self, group: Sequence[LinearMatch], columns_to_copy: Callable[[Sequence[LinearMatch]], int]
    ) -> bool:
        """Whether frozen siblings are worth being one GEMM. Without tensor cores, or without M, they are.

        Args:
            group: the siblings.
            columns_to_copy: tells how many columns of the one GEMM's result would have to be copied. It takes longer
                than what is known without it.
        """
        first = group[0]
        m = traced_size(first.m)
        if m is None or not self._on_tensor_cores(first, groups=False):
            return True
        widths = [match.n for match in group]
        linear = Linear(m, first.k, sum(widths), _dtype(first), ("forward",), frozen=True)
        return should_merge(
            linear, widths, columns_to_copy(group), self._recipe(first), self.times(first.tensor.device)
        )

    def choose(self, group: Sequence[LinearMatch], readers: int, is_frozen: bool) -> Choice:
        """Which GEMMs are worth FP8; all that the recipe has if there is nothing to weigh.

        Args:
            group: a linear, or siblings that become one GEMM.
            readers: how many linears read its input.
            is_frozen: whether the weights are quantized beforehand.
        """
        first = group[0]
        if isinstance(first, GroupedMatch):
            return self._choose_experts(first, is_frozen)
        m = traced_size(first.m)
        gemms = _gemms(first)
        takes_all = self._is_always(first) or m is None
        if not self._on_tensor_cores(first, groups=False) or (takes_all and not is_frozen):
            return Choice(possible(gemms, self._recipe(first), is_frozen))
        linear = Linear(
            m or 0,
            first.k,
            sum(match.n for match in group),
            _dtype(first),
            gemms,
            siblings=1 if is_frozen else readers,
            input_fused=_are_fused([first.input], self.matmuls, _inputs),
            grad_fused=all(_are_fused(match.node.users, self.matmuls, _users) for match in group),
            frozen=is_frozen,
            dynamic=not isinstance(first.m, int),
        )
        return choose(linear, self._recipe(first), self.times(first.tensor.device), takes_all)

    def _choose_experts(self, match: GroupedMatch, is_frozen: bool) -> Choice:
        """Of a weight for each of several experts; predicted, since no such GEMM is measured here."""
        m = traced_size(match.m)
        if self._is_always(match) or m is None or not self._on_tensor_cores(match, groups=True):
            return Choice(possible(grouped.GEMMS, self._recipe(match), is_frozen))
        experts = match.tensor.shape[0]
        linear = Linear(m, match.k, match.n, torch.bfloat16, grouped.GEMMS, frozen=is_frozen, experts=experts)
        return choose(linear, self._recipe(match))
