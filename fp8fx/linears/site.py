"""A matmul of a graph, and what is known about it so far."""

from __future__ import annotations

import math
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from fp8fx.graph.names import name_of
from fp8fx.graph.values import fake, traced_size
from fp8fx.linears.matches import LinearMatch, Refusal, Size
from fp8fx.linears.views import NONE, Views, apply, laid_out
from fp8fx.linears.weights import weight_behind

__all__ = ["ACTIVATIONS", "COMPUTED", "GIVEN", "OWN_OPERANDS", "SHAPE_UNKNOWN", "Site", "columns", "rows"]


def rows(x: Tensor | None) -> Size:
    return None if x is None else math.prod(x.shape[:-1])


def columns(w: Tensor | None, transposed: bool) -> tuple[Size, Size]:
    """K and N of a right operand (K, N), or (N, K) where `transposed`; of a vector (K,) one column."""
    if w is None or w.dim() < 2:
        return (w.shape[0], 1) if w is not None and w.dim() else (None, None)
    k, n = w.shape[:-3:-1] if transposed else w.shape[-2:]
    return k, n


COMPUTED = "the weight is computed, not a parameter, a buffer, a constant or a view of one"


GIVEN = "the weight is an input of the graph, and no parameter"


GATHERED = "the weight is gathered by an index"


ACTIVATIONS = "activation times activation"


OWN_OPERANDS = "both operands are the model's own, and neither is an activation of the call"


SHAPE_UNKNOWN = "the input's shape is not known; pass example inputs"


def is_gathered_from(node: fx.Node, root: fx.Node) -> bool:
    """Whether an index that the graph computes chooses among the weights of `root`, of which `node` is a part."""
    while node is not root and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node is not root


@dataclass
class Site:
    """A matmul, and what is known about it so far."""

    node: fx.Node
    form: str
    path: str
    constants: set[fx.Node]
    states: Set[fx.Node] = frozenset()
    own: Set[fx.Node] = frozenset()
    sizes: tuple[Size, Size, Size] = (None, None, None)

    def refuse(self, reason: str, name: str = "") -> Refusal:
        return Refusal(self.node, self.form, reason, self.path, name, *self.sizes)

    def refuse_shape(self, weight: fx.Node, root: fx.Node) -> Refusal:
        """Of a weight that is not 2-D."""
        w = fake(weight)
        several = w is not None and w.dim() == 3
        return self.refuse(
            GATHERED
            if several and is_gathered_from(weight, root)
            else f"the weight is {'?' if w is None else w.dim()}-D, not 2-D",
            name_of(root),
        )

    def is_own(self, *operands: fx.Node) -> bool:
        """Whether the product is the model's own as well, such as the norm of a weight: no linear of the call."""
        return self.own >= set(operands)

    def weight_behind(self, node: fx.Node) -> fx.Node | None:
        found = weight_behind(node, self.constants)
        return None if found in self.states else found

    def match(
        self, x: fx.Node, weight: fx.Node, root: fx.Node, views: Views = NONE, transposed: bool = False, **addend: Any
    ) -> LinearMatch | Refusal:
        """`x @ weight` where the operands, so seen, are (*, K) and (K, N), or (N, K) where `transposed`."""
        name, known, w = name_of(root), fake(x), fake(weight)
        seen = None if w is None else apply(w, views.weight)
        if w is None or seen is None or seen.dim() != 2:
            return self.refuse_shape(weight, root)
        k, n = seen.shape[::-1] if transposed else seen.shape
        if not isinstance(k, int) or not isinstance(n, int):
            return self.refuse(f"the weight's shape ({k}, {n}) is symbolic", name)
        if known is not None:
            known = apply(known, views.input)
            if (
                views is not NONE and (like := fake(self.node)) is not None
            ):  # a plain matmul's result is contiguous, as the op's
                views = laid_out(views, apply(known.new_empty((*known.shape[:-1], n)), views.output), like)
        where = self.node, self.form, self.path, name
        return LinearMatch(
            *where,
            x,
            weight,
            None,
            transposed,
            m=rows(known),
            k=k,
            n=n,
            tensor=w,
            views=views,
            **{"bias": None, "alpha": 1, "beta": 1, **addend},
        )

    def match_experts(
        self, x: fx.Node, weight: fx.Node, root: fx.Node, offs: fx.Node | None = None
    ) -> LinearMatch | Refusal:
        """`x @ weight` where each expert has rows of `x`, (M, K) sorted by `offs` or (E, M / E, K), and its weight of (E, K, N)."""
        name, known, w = name_of(root), fake(x), fake(weight)
        assert w is not None
        if is_gathered_from(weight, root):
            return self.refuse(GATHERED, name)
        whole = fake(root)
        if whole is not None and (traced_size(w.numel()) or 0) > (traced_size(whole.numel()) or 0):
            return self.refuse("the weight is expanded over a batch", name)
        k, n = w.shape[-2:]
        if not isinstance(k, int) or not isinstance(n, int):
            return self.refuse(f"the weight's shape ({k}, {n}) is symbolic", name)
        where = self.node, self.form, self.path, name
        return LinearMatch(*where, x, weight, None, False, None, 1, 1, rows(known), k, n, w, grouped=True, offs=offs)
