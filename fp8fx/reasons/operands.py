"""Reasons why FP8 cannot compute a linear: what its operands are, and where it runs."""

from __future__ import annotations

from enum import unique

from fp8fx.reasons.reason import Reason

__all__ = ["OperandReason", "PlaceReason"]


@unique
class OperandReason(Reason):
    """Operands that FP8 does not take."""

    SHAPE_UNKNOWN = (
        "the input's shape is not known; pass example inputs",
        "einsum, tensordot, inner, `W @ x`, convolutions and grouped matmuls of a symbolic_trace graph.",
        "Pass example inputs.",
    )
    MISFIT = (
        "the input's shape {shape} does not multiply with K={k}",
        "An error of the model's, which stays its own.",
    )
    NOT_PLAIN = (
        "the {operand} is a {type}, not a plain tensor",
        "Tensor subclasses: DTensor, weights quantized by another library, nested tensors (rows of various lengths).",
    )
    SPARSE = (
        "the {operand} is sparse: {layout}",
        "FP8 tensors are dense.",
    )
    DTYPE = (
        "the {operand} is {dtype}; FP8 takes float32, float16 or bfloat16",
        "float64, integer and complex operands.",
        "Cast it to one of these dtypes.",
    )
    EXPERTS_DTYPE = (
        "a weight for each of several experts, and not in bfloat16",
        "The grouped matmul takes bfloat16 alone.",
        "Run the model in bfloat16.",
    )
    EXPERTS_UNALIGNED = (
        "a weight for each of several experts, and K={k}, N={n} not both multiples of {multiple}",
        "The grouped matmul pads nothing.",
    )
    EXECUTOR = (
        "{executor_error}",
        'A weight for each of several experts, and `executor="scaled_mm"` on a device '
        "whose tensor cores do not multiply groups in FP8.",
        'Use `executor="auto"`.',
    )


@unique
class PlaceReason(Reason):
    """Where the call stands."""

    TRANSFORM = (
        "the {operand} is inside a transform of torch.func (vmap, grad, ...)",
        "The ops have no rule for it.",
    )
    FORWARD_MODE = (
        "inside forward-mode differentiation (torch.autograd.forward_ad)",
        "The ops have no rule for it. It is between `torch.autograd.forward_ad.make_dual` and `unpack_dual`.",
    )
    STEPS = (
        "inside a {operator} that needs gradients: torch cannot store the FP8 tensors of each step",
        "The body of a `while_loop` or a `scan`. What the gradient needs of each step is written into one tensor, "
        "which torch has no FP8 kernel for.",
        "Without gradients such bodies are rewritten. Those of `cond` and `map` are rewritten with gradients, too.",
    )
    IN_NO_GRAPH = (
        "in no graph: not called, or run outside of them",
        "A weight of the model that no captured graph reads.",
        "See [In no graph](#in-no-graph).",
    )
