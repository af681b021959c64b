"""What an attention mask hides: a proof, by evaluating the nodes that make it.

A mask that depends on no input of the call and on none of the model's tensors, such as one of comparisons of `arange`,
is the same in each call. So it can be made once, while the graph is compiled, and compared. If sizes are symbolic, the
comparison of coordinates that the nodes write down has to be that of a triangle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, fx

from fp8fx.graph.bodies import has_flat_inputs
from fp8fx.graph.constants import constants, repeats, tensors
from fp8fx.graph.index_terms import UnknownTableError, conditions, table_of
from fp8fx.graph.mutations import Writes
from fp8fx.graph.names import MASK, input_name, name_of
from fp8fx.graph.operators import called, overloads
from fp8fx.graph.values import attribute, fake, value
from fp8fx.reasons import Because, MaskReason, Reason
from fp8fx.torch_internals import HigherOrderOperator, disable_current_modes

__all__ = ["Hidden", "MaskedAttention", "Masks", "hidden_by", "hidden_for_any_size", "inner_graphs"]

_MOST_ELEMENTS = 1 << 28
"""Of a mask that is evaluated: 16384 x 16384. Larger ones would take memory that the user has not given us."""


_CASTS = {"bool", "int", "long", "half", "bfloat16", "float", "double"}
"""Methods that are no operators of their own name."""


class Hidden(Enum):
    """What a mask hides, if SDPA can say it without a mask."""

    NOTHING = "no mask"
    LATER_KEYS = "is_causal=True"


@dataclass(frozen=True)
class MaskedAttention:
    """A call of attention that had a mask.

    Attributes:
        path: the module it stands in; empty for the root.
        mask: the mask's shape as text, (*, L, S) for L queries and S keys; `?` if it is not known.
        hidden: what the mask hides, if the call does without it now; otherwise why it has it still.
    """

    path: str
    mask: str
    hidden: Hidden | Because

    @property
    def became(self) -> str | None:
        """What took the mask's place, `is_causal=True` or `no mask`; None if it was left alone."""
        return self.hidden.value if isinstance(self.hidden, Hidden) else None

    @property
    def reason(self) -> str | None:
        """Why it was left alone, as text; None if it was not."""
        return None if isinstance(self.hidden, Hidden) else str(self.hidden)

    @property
    def kind(self) -> Reason | None:
        """What kind of reason that is, for programs: a member of `fp8fx.reasons.MaskReason`."""
        return None if isinstance(self.hidden, Hidden) else self.hidden.kind


def hidden_by(mask: Tensor) -> Hidden | None:
    """What a mask (*, L, S) hides; None if it is anything else.

    Args:
        mask: True at what is looked at, or a float that is added: 0, or -inf or the dtype's least at what is hidden.
            Later keys are those right of the diagonal that starts at the top left, as SDPA's `is_causal` counts.
    """
    seen = mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool and not bool((seen | (mask <= torch.finfo(mask.dtype).min)).all()):
        return None
    if bool(seen.all()):
        return Hidden.NOTHING
    if mask.dim() < 2 or mask.shape[-2] == 1:  # one row is that of every query
        return None
    triangle = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril()
    return Hidden.LATER_KEYS if bool((seen == triangle).all()) else None


def hidden_for_any_size(nodes: Sequence[fx.Node]) -> Hidden | None:
    """What the mask that the last of these nodes makes hides, whatever its symbolic sizes are; None if not known."""
    try:
        terms, row, column = conditions(table_of(nodes))
    except UnknownTableError:
        return None
    if not terms:
        return Hidden.NOTHING
    return Hidden.LATER_KEYS if terms == {row - column} else None


class Masks:
    """The masks of one graph, each evaluated once.

    Args:
        gm: the graph's module.
        constants: the nodes that hold a parameter, a buffer or a constant.
        writes: what the graph changes in place.
    """

    def __init__(self, gm: fx.GraphModule, constants: Set[fx.Node], writes: Writes) -> None:
        self._constants = constants
        self._written = _written(gm, writes)
        self._hidden: dict[fx.Node, Hidden | Because] = {}

    def of(self, mask: fx.Node) -> Hidden | Because:
        """What a mask's node hides, or why that is not known."""
        if mask not in self._hidden:
            known = mask.meta.get(MASK) if mask.op == "placeholder" else None
            self._hidden[mask] = known or self._prove(mask)
        return self._hidden[mask]

    def _prove(self, mask: fx.Node) -> Hidden | Because:
        nodes = self._made_of(mask)
        if isinstance(nodes, Because):
            return nodes
        try:
            if any(isinstance(value(node), torch.SymInt) for node in nodes):
                return hidden_for_any_size(nodes) or MaskReason.SYMBOLIC_SIZE()
            elements = max(_elements(node) for node in nodes)
            if elements <= _MOST_ELEMENTS:
                return hidden_by(_evaluate(nodes)) or MaskReason.OTHER()
            return hidden_for_any_size(nodes) or MaskReason.TOO_LARGE(elements=elements, most=_MOST_ELEMENTS)
        except Exception as error:  # whatever it is, the mask stays as it is
            return MaskReason.NOT_EVALUATED(error=f"{type(error).__name__}: {error}".splitlines()[0])

    def _made_of(self, mask: fx.Node) -> list[fx.Node] | Because:
        """The calls that make the mask out of nothing, in the graph's order; why not, if it is made of more."""
        seen = {mask}
        pending = [mask]
        while pending:
            node = pending.pop()
            if isinstance(value(node), torch.SymInt):
                continue  # of whatever it is the size
            if (why := self._why_not_repeated(node)) is not None:
                return why
            pending += [source for source in node.all_input_nodes if source not in seen]
            seen.update(node.all_input_nodes)
        return sorted(seen)

    def _why_not_repeated(self, node: fx.Node) -> Because | None:
        """Why a node's value may differ from call to call, or from what its call alone gives."""
        if node in self._constants or node.op == "get_attr":
            return MaskReason.MODELS_TENSOR(name=name_of(node))
        if node.op == "placeholder":
            return MaskReason.INPUT(name=input_name(node))
        if not _is_operator_that_repeats(node):
            return MaskReason.CODE(node=node.name)
        return MaskReason.WRITTEN(node=node.name) if node in self._written else None


def _is_operator_that_repeats(node: fx.Node) -> bool:
    """Whether a call is of torch's or Python's operators, whose tags are known, and draws no random numbers."""
    if node.op == "call_module" or isinstance(node.target, HigherOrderOperator):
        return False
    if getattr(node.target, "__module__", "") == "_operator" or called(node) in _CASTS:
        return True
    return bool(overloads(called(node))) and repeats(node)


def _written(gm: fx.GraphModule, writes: Writes) -> set[fx.Node]:
    """What the graph changes in place. A body, such as that of a checkpointed layer, may change none of its inputs."""
    return writes.changed_by({node for node in writes.writers if not _leaves_its_inputs(gm, node)})


def _leaves_its_inputs(gm: fx.GraphModule, call: fx.Node) -> bool:
    """Whether a node calls a body that changes none of its inputs."""
    bodies = inner_graphs(gm, call) if has_flat_inputs(call) else []
    if len(bodies) != 1:
        return False
    (body,) = bodies
    changed = _written(body, Writes(body, constants(body, None), tensors(body, None)))
    return not any(node.op == "placeholder" for node in changed)


def inner_graphs(gm: fx.GraphModule, call: fx.Node) -> list[fx.GraphModule]:
    """The bodies that a higher-order operator's node calls."""
    named = [attribute(gm, str(node.target)) for node in call.all_input_nodes if node.op == "get_attr"]
    return [body for body in named if isinstance(body, fx.GraphModule)]


def _elements(node: fx.Node) -> int:
    """How many elements a node's value has.

    Raises:
        ValueError: that is not known.
    """
    x = fake(node)
    if x is None:
        raise ValueError(f"the size of {node.name} is not known")
    return x.numel()


def _evaluate(nodes: list[fx.Node]) -> Any:
    """What the last node computes, without any mode that would trace it or fake it.

    Raises:
        ValueError: a value has another dtype than in the graph, where autocast may change it.
    """
    last_use = {source: node for node in nodes for source in node.all_input_nodes}
    values = dict[fx.Node, Any]()
    with disable_current_modes(), torch.no_grad():
        for node in nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = _called(node)(*args, **kwargs)
            expected = fake(node)
            if expected is not None and values[node].dtype != expected.dtype:
                raise ValueError(f"{node.name} is {values[node].dtype} here and {expected.dtype} in the graph")
            for source in node.all_input_nodes:
                if last_use[source] is node:
                    values.pop(source, None)
    return values[nodes[-1]]


def _called(node: fx.Node) -> Callable[..., Any]:
    """The function, or the method of its first argument, that a node calls."""
    target: Any = node.target
    return target if node.op == "call_function" else lambda x, *args, **kwargs: getattr(x, target)(*args, **kwargs)
