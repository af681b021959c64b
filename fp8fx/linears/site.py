"""Where a matmul stands: its node, its form, and what the graph's nodes are. A match or a refusal is made of these."""

from __future__ import annotations

import math
from collections.abc import Set
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx

from fp8fx.graph.names import module_path, name_of
from fp8fx.graph.operators import spelling
from fp8fx.graph.values import fake, traced_size
from fp8fx.linears.form import Form
from fp8fx.linears.matches import GroupedMatch, LinearMatch, MatmulMatch, Refusal, Size
from fp8fx.linears.views import NONE, Views, apply, laid_out
from fp8fx.linears.weight_operand import weight_behind
from fp8fx.reasons import Because, WeightReason

__all__ = ["NodeKinds", "Site", "columns", "rows"]


def rows(x: Tensor | None) -> Size:
    """M of a left operand (*, K); None if it is not known."""
    return None if x is None else math.prod(x.shape[:-1])


def columns(w: Tensor | None, transposed: bool) -> tuple[Size, Size]:
    """K and N of a right operand (K, N), or (N, K) if `transposed`; a vector (K,) has one column."""
    if w is None or w.dim() == 0:
        return None, None
    if w.dim() == 1:
        return w.shape[0], 1
    k, n = w.shape[:-3:-1] if transposed else w.shape[-2:]
    return k, n


def _is_gathered_from(node: fx.Node, root: fx.Node) -> bool:
    """Whether an index that the graph computes chooses among the weights of `root`, of which `node` is a part."""
    while node is not root and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node is not root


@dataclass(frozen=True, kw_only=True)
class NodeKinds:
    """Which nodes of a graph may be weights.

    Attributes:
        constants: those that hold a parameter, a buffer or a constant.
        computed: those that depend on constants alone.
        states: constants that the graph has written up to the node; the pass adds to them on its way. In a matmul that
            names no weight they are activations.
        own: those that no input of the call reaches.
    """

    constants: Set[fx.Node]
    computed: Set[fx.Node] = field(default=frozenset())
    states: Set[fx.Node] = field(default=frozenset())
    own: Set[fx.Node] = field(default=frozenset())


@dataclass(frozen=True, kw_only=True)
class Site:
    """A matmul of a graph.

    Attributes:
        node: its node.
        form: how it is written.
        spelling: the same for people to read.
        path: the path of the module it stands in.
        kinds: which nodes may be its weight.
        sizes: M, K and N as far as they are known.
    """

    node: fx.Node
    form: Form
    spelling: str
    path: str
    kinds: NodeKinds
    sizes: tuple[Size, Size, Size] = (None, None, None)

    @classmethod
    def of_call(cls, node: fx.Node, form: Form, kinds: NodeKinds) -> Site:
        """The site of a call of a function, method or operator."""
        return cls(node=node, form=form, spelling=spelling(node), path=module_path(node), kinds=kinds)

    def sized(self, m: Size, k: Size, n: Size) -> Site:
        """The same site, its sizes known."""
        return replace(self, sizes=(m, k, n))

    def refuse(self, reason: Because, name: str = "") -> Refusal:
        """The matmul, left alone; `name` is its weight's."""
        m, k, n = self.sizes
        return Refusal(node=self.node, spelling=self.spelling, reason=reason, path=self.path, name=name, m=m, k=k, n=n)

    def refuse_shape(self, weight: fx.Node, root: fx.Node) -> Refusal:
        """The matmul, left alone since its weight is not 2-D."""
        w = fake(weight)
        if w is not None and w.dim() == 3 and _is_gathered_from(weight, root):
            return self.refuse(WeightReason.GATHERED(), name_of(root))
        return self.refuse(WeightReason.NOT_2D(dims="?" if w is None else w.dim()), name_of(root))

    def is_own(self, *operands: fx.Node) -> bool:
        """Whether the product is the model's own as well, such as the norm of a weight: no linear of the call."""
        return not self.form.names_its_weight and self.kinds.own >= set(operands)

    def weight_behind(self, node: fx.Node) -> fx.Node | None:
        """The constant that `node` is a view, a part or a cast of; None if there is none, or it is an activation."""
        root = weight_behind(node, self.kinds.constants)
        if root in self.kinds.states and not self.form.names_its_weight:
            return None
        return root

    def match(
        self,
        x: fx.Node,
        weight: fx.Node,
        root: fx.Node,
        *,
        views: Views = NONE,
        transposed: bool = False,
        **addend: Any,
    ) -> LinearMatch | Refusal:
        """`x @ weight`, if the operands are (*, K) and (K, N) as `views` sees them, or (N, K) if `transposed`.

        `root` is the constant behind `weight`; `addend` is MatmulMatch's `bias`, `alpha` and `beta`.
        """
        w = fake(weight)
        seen_weight = None if w is None else apply(w, views.weight)
        if w is None or seen_weight is None or seen_weight.dim() != 2:
            return self.refuse_shape(weight, root)
        k, n = seen_weight.shape[::-1] if transposed else seen_weight.shape
        if not isinstance(k, int) or not isinstance(n, int):
            return self.refuse(WeightReason.SYMBOLIC(k=k, n=n), name_of(root))
        seen_x = fake(x)
        if seen_x is not None:
            seen_x = apply(seen_x, views.input)
            result = fake(self.node)
            if views is not NONE and result is not None:  # a plain matmul's result is contiguous, as the op's
                made = apply(seen_x.new_empty((*seen_x.shape[:-1], n)), views.output)
                views = laid_out(views, made, result)
        return MatmulMatch(
            node=self.node,
            form=self.form,
            spelling=self.spelling,
            path=self.path,
            name=name_of(root),
            input=x,
            tensor=w,
            m=rows(seen_x),
            k=k,
            n=n,
            views=views,
            transposed=transposed,
            weight=weight,
            **addend,
        )

    def match_experts(
        self, x: fx.Node, weight: fx.Node, root: fx.Node, offs: fx.Node | None = None
    ) -> LinearMatch | Refusal:
        """`x @ weight`, each expert with its rows and its weight.

        The rows `x` are (M, K) sorted by `offs`, or (E, M / E, K) without; the weights are (E, K, N).
        """
        name = name_of(root)
        w = fake(weight)
        assert w is not None
        if _is_gathered_from(weight, root):
            return self.refuse(WeightReason.GATHERED(), name)
        whole = fake(root)
        if whole is not None and (traced_size(w.numel()) or 0) > (traced_size(whole.numel()) or 0):
            return self.refuse(WeightReason.EXPANDED(), name)
        k, n = w.shape[-2:]
        if not isinstance(k, int) or not isinstance(n, int):
            return self.refuse(WeightReason.SYMBOLIC(k=k, n=n), name)
        return GroupedMatch(
            node=self.node,
            form=self.form,
            spelling=self.spelling,
            path=self.path,
            name=name,
            input=x,
            tensor=w,
            m=rows(fake(x)),
            k=k,
            n=n,
            weight=weight,
            offs=offs,
        )
