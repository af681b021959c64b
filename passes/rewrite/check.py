"""check: a match that FP8 cannot compute -> a Refusal. The graph stays as it is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fp8fx.config import Config
from fp8fx.errors import ExecutorError
from fp8fx.executors.registry import names_that_keep_fp8_weights, resolve
from fp8fx.executors.scaled_mm import ALIGNMENT
from fp8fx.graph.values import fake, traced_size
from fp8fx.linears.matches import GroupedMatch, LinearMatch
from fp8fx.linears.views import apply
from fp8fx.ops.fp8_weight import FP8Weight
from fp8fx.ops.operands import DTYPES
from fp8fx.pipeline import Rewrite
from fp8fx.reasons import Because, OperandReason, PlaceReason, WeightReason
from fp8fx.torch_internals import FakeTensor, is_functorch_wrapped_tensor

__all__ = ["CHANGES", "NEEDS", "run", "why_illegal"]

NEEDS: tuple[str, ...] = ("forward_mode",)
CHANGES = False


def why_illegal(match: LinearMatch, config: Config) -> Because | None:
    """Why the match cannot be FP8; None if it can.

    Raises:
        ExecutorError: the executor asked for by name cannot run where the weight is.
    """
    x = match.x
    if match.k == 0 or match.n == 0 or (isinstance(match, GroupedMatch) and not _has_experts(match)):
        return WeightReason.EMPTY(k=match.k, n=match.n)
    why = _why_not_operand("input", x) or _why_not_operand("weight", match.tensor)
    if why is None and match.own_recipe is not None and not _sums_over_k(match):
        why = WeightReason.FP8_ALONG_N()
    if why is None and isinstance(match, GroupedMatch):
        why = _why_not_grouped(match)
    if why is not None:
        return why
    if x is not None and (x.dim() == 0 or x.shape[-1] != match.k):
        return OperandReason.MISFIT(shape=tuple(x.shape), k=match.k)
    return _why_not_on_device(match, config)


def _has_experts(match: GroupedMatch) -> bool:
    return traced_size(match.tensor.shape[0]) != 0


def _sums_over_k(match: LinearMatch) -> bool:
    """Whether a weight that is FP8 already is read along its K, which its scales allow."""
    weight = apply(match.tensor, match.views.weight)
    return isinstance(weight, FP8Weight) and weight.is_k(-1 if match.transposed else -2)


def _why_not_operand(name: str, operand: Tensor | None) -> Because | None:
    """Why the ops do not take a tensor; None if they do, or if it is not known."""
    if operand is None:
        return None
    if type(operand) not in (Tensor, nn.Parameter, FakeTensor, FP8Weight):
        return OperandReason.NOT_PLAIN(operand=name, type=type(operand).__name__)
    if operand.layout != torch.strided:
        return OperandReason.SPARSE(operand=name, layout=str(operand.layout).removeprefix("torch."))
    if is_functorch_wrapped_tensor(operand):
        return PlaceReason.TRANSFORM(operand=name)
    # Two float dtypes can meet under autocast only, and the op casts as autocast does.
    if operand.dtype not in DTYPES:
        return OperandReason.DTYPE(operand=name, dtype=str(operand.dtype).removeprefix("torch."))
    return None


def _why_not_grouped(match: GroupedMatch) -> Because | None:
    """Why the grouped ops do not take it, which cast and pad nothing."""
    result = fake(match.node)
    if (match.tensor if result is None else result).dtype != torch.bfloat16:
        return OperandReason.EXPERTS_DTYPE()
    if match.k % ALIGNMENT or match.n % ALIGNMENT:
        return OperandReason.EXPERTS_UNALIGNED(k=match.k, n=match.n, multiple=ALIGNMENT)
    return None


def _why_not_on_device(match: LinearMatch, config: Config) -> Because | None:
    """Why the executor cannot compute this one; what it cannot compute at all raises."""
    device = match.tensor.device
    if device.type == "meta":
        return None
    executor = resolve(config.executor, device)
    if match.own_recipe is not None and not executor.keeps_fp8_weights:
        others = ", ".join(map(repr, names_that_keep_fp8_weights()))
        raise ExecutorError(
            f"{match.name} is an FP8 weight, and executor {executor.name!r} keeps no FP8 weights; use {others}"
        )
    if not isinstance(match, GroupedMatch):
        return None
    try:
        resolve(config.executor, device, groups=True)
    except ExecutorError as error:
        return OperandReason.EXECUTOR(executor_error=str(error))
    return None


def run(rewrite: Rewrite) -> int:
    """Moves what is not legal from `matches` to `refusals`; returns how many."""
    matches = rewrite.matches
    rewrite.matches = []
    differentiated = rewrite.facts.forward_mode
    for match in matches:
        reason = rewrite.barred or why_illegal(match, rewrite.config)
        if reason is None and match.node in differentiated:
            reason = PlaceReason.FORWARD_MODE()
        if reason is None:
            rewrite.matches.append(match)
        else:
            rewrite.refuse(match, reason)
    return len(matches) - len(rewrite.matches)
