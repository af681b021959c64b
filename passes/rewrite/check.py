"""check: a match that FP8 cannot compute -> a Refusal. The graph stays as it is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fp8fx.config import Config
from fp8fx.errors import ExecutorError
from fp8fx.executors.registry import resolve
from fp8fx.executors.scaled_mm import ALIGNMENT
from fp8fx.graph.values import fake, traced_size
from fp8fx.linears.matches import GroupedMatch, LinearMatch
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
    x, weight = match.x, match.tensor
    grouped = isinstance(match, GroupedMatch)
    if match.k == 0 or match.n == 0 or (grouped and traced_size(weight.shape[0]) == 0):
        return WeightReason.EMPTY(k=match.k, n=match.n)
    for name, operand in (("input", x), ("weight", weight)):
        if operand is None:
            continue
        if type(operand) not in (Tensor, nn.Parameter, FakeTensor):
            return OperandReason.NOT_PLAIN(operand=name, type=type(operand).__name__)
        if operand.layout != torch.strided:
            return OperandReason.SPARSE(operand=name, layout=str(operand.layout).removeprefix("torch."))
        if is_functorch_wrapped_tensor(operand):
            return PlaceReason.TRANSFORM(operand=name)
        # Two float dtypes can meet under autocast only, and the op casts as autocast does.
        if operand.dtype not in DTYPES:
            return OperandReason.DTYPE(operand=name, dtype=str(operand.dtype).removeprefix("torch."))
    if grouped:
        result = fake(match.node)
        if (weight if result is None else result).dtype != torch.bfloat16:
            return OperandReason.EXPERTS_DTYPE()
        if match.k % ALIGNMENT or match.n % ALIGNMENT:
            return OperandReason.EXPERTS_UNALIGNED(k=match.k, n=match.n, multiple=ALIGNMENT)
    if x is not None and (x.dim() == 0 or x.shape[-1] != match.k):
        return OperandReason.MISFIT(shape=tuple(x.shape), k=match.k)
    if weight.device.type != "meta":
        resolve(config.executor, weight.device)
        if grouped:
            try:
                resolve(config.executor, weight.device, groups=True)
            except ExecutorError as error:  # of this matmul alone
                return OperandReason.EXECUTOR(executor_error=str(error))
    return None


def run(rewrite: Rewrite) -> int:
    """Moves what is not legal from `matches` to `refusals`; returns how many."""
    matches, rewrite.matches = rewrite.matches, []
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
