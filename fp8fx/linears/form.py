"""What a form is: one way to write a linear, with all that the code asks of it."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from fp8fx.graph.operators import is_operator
from fp8fx.reasons import Reason

__all__ = ["Family", "Form", "bind"]

ContractionReader = Callable[[dict[str, Any]], tuple[Any, Any]]
"""Of a call's arguments by name: the operands, and what is contracted (an equation, or dimensions)."""


class Family(enum.Enum):
    """Which matcher reads a form."""

    MATMUL = "matmuls"
    CONTRACTION = "contractions"
    CONVOLUTION = "convolutions"
    GROUPED = "grouped"
    LEFT_ALONE = "left alone"


@dataclass(frozen=True, kw_only=True)
class Form:
    """One way to write a linear.

    Attributes:
        operator: the name of the operator, as `graph.operators.called` gives it.
        family: which matcher reads it.
        example: how it is written, which the tests run: of an input `{x}` (*, K), a weight `{w}` (N, K) or `{v}` (K,
            N), a bias `{b}` (N,), an addend `{c}` of the result's shape. Of a grouped matmul `{v}` is (E, K, N), and
            `{o}` says where the rows of each expert end. Empty for calls that are left alone.
        example_dims: how many dimensions the example's input has.
        arguments: what its arguments are called, in order.
        operator_arguments: those of the ATen operator, if they differ from the function's.
        spreads_operands: whether the function takes its operands one by one as well as in a list, as einsum does.
        left: the name of the left operand, (*, K).
        right: the name of the right operand, (K, N).
        addend: the name of what is added to the product; None for nothing.
        is_transposed: whether the right operand is (N, K) instead.
        is_layer: whether the right operand is a weight by definition. If it is none of the model's, it is computed or
            given, and no activation.
        names_its_weight: whether it stays a linear if its weight is a state, or if both operands are the model's own.
        may_have_weight_on_the_left: whether `weight @ input` is a linear as well.
        in_place: whether the result is added to a tensor in place.
        sums_batch: whether the products of a batch are summed.
        casts_under_autocast: whether autocast casts its operands on every device.
        needs_a_matrix: whether it is no matmul if all of its operands are vectors, or any a number.
        read_contraction: how to read the operands and what is contracted; for contractions.
        module: the module that calls it.
        why_left_alone: the kind of reason why a call is never rewritten; for those that are left alone.
        opened_by_expand: whether the pass `expand` puts the calls that it is made of in its place, if it can.
    """

    operator: str
    family: Family
    example: str = ""
    example_dims: int = 2
    arguments: tuple[str, ...] = ()
    operator_arguments: tuple[str, ...] | None = None
    spreads_operands: bool = False
    left: str = "input"
    right: str = "mat2"
    addend: str | None = None
    is_transposed: bool = False
    is_layer: bool = False
    names_its_weight: bool = False
    may_have_weight_on_the_left: bool = False
    in_place: bool = False
    sums_batch: bool = False
    casts_under_autocast: bool = True
    needs_a_matrix: bool = False
    read_contraction: ContractionReader | None = None
    module: type[nn.Module] | None = None
    why_left_alone: Reason | None = None
    opened_by_expand: bool = False

    @property
    def is_rewritten(self) -> bool:
        """Whether FP8 computes it, if one operand is a weight that fits."""
        return self.why_left_alone is None and not self.in_place and not self.sums_batch

    def arguments_of(self, node: fx.Node) -> tuple[str, ...]:
        """What the arguments of a call are named, in order."""
        if self.operator_arguments is not None and is_operator(node.target):
            return self.operator_arguments
        return self.arguments

    def bind(self, node: fx.Node) -> dict[str, Any] | None:
        """A call's arguments by name; None if it has others than the form."""
        args = node.args
        if self.spreads_operands and not is_operator(node.target):
            first, *operands = args
            args = (first, operands[0] if isinstance(operands[0], (tuple, list)) else tuple(operands))
        return bind(args, node.kwargs, self.arguments_of(node))


_OTHER_NAMES = {"mat_a": "input", "mat_b": "mat2", "other": "mat2", "self": "input", "tensor2": "mat2", "vec": "mat2"}
"""What torch calls some arguments in one of a function's spellings."""


def bind(args: tuple[Any, ...], kwargs: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any] | None:
    """Arguments by name; None if there are others than `names`."""
    bound = dict(zip(names, args, strict=False))
    for key, argument in kwargs.items():
        bound[key if key in names else _OTHER_NAMES.get(key, key)] = argument
    if len(args) > len(names) or not set(bound) <= set(names):
        return None
    return bound
