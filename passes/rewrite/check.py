"""check: a match that FP8 cannot compute -> a Refusal. The graph stays as it is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fp8fx.config import Config
from fp8fx.errors import ExecutorError
from fp8fx.executors.registry import resolve
from fp8fx.executors.scaled_mm import ALIGNMENT
from fp8fx.graph.bodies import FORWARD_MODE
from fp8fx.graph.values import fake, traced_size
from fp8fx.linears.matches import LinearMatch
from fp8fx.ops.operands import DTYPES
from fp8fx.pipeline import Rewrite
from fp8fx.torch_internals import FakeTensor, is_functorch_wrapped_tensor

__all__ = ["CHANGES", "NEEDS", "can_rewrite", "run"]

NEEDS: tuple[str, ...] = ("forward_mode",)
CHANGES = False


def can_rewrite(match: LinearMatch, config: Config) -> str | None:
    """Why the match cannot be FP8; None if it can.

    Raises:
        ExecutorError: the executor asked for by name cannot run where the weight is.
    """
    x, weight = match.x, match.tensor
    if match.k == 0 or match.n == 0 or (match.grouped and traced_size(weight.shape[0]) == 0):
        return f"the weight is empty: K={match.k}, N={match.n}"
    for name, operand in (("input", x), ("weight", weight)):
        if operand is None:
            continue
        if type(operand) not in (Tensor, nn.Parameter, FakeTensor):
            return f"the {name} is a {type(operand).__name__}, not a plain tensor"
        if operand.layout != torch.strided:
            return f"the {name} is sparse: {str(operand.layout).removeprefix('torch.')}"
        if is_functorch_wrapped_tensor(operand):
            return f"the {name} is inside a transform of torch.func (vmap, grad, ...)"
        # Two float dtypes can meet under autocast only, and the op casts as autocast does.
        if operand.dtype not in DTYPES:
            return f"the {name} is {str(operand.dtype).removeprefix('torch.')}; FP8 takes float32, float16 or bfloat16"
    if match.grouped:
        result = fake(match.node)
        if (weight if result is None else result).dtype != torch.bfloat16:
            return "a weight for each of several experts, and not in bfloat16"
        if match.k % ALIGNMENT or match.n % ALIGNMENT:
            return (
                f"a weight for each of several experts, and K={match.k}, N={match.n} not both multiples of {ALIGNMENT}"
            )
    if x is not None and (x.dim() == 0 or x.shape[-1] != match.k):
        return f"the input's shape {tuple(x.shape)} does not multiply with K={match.k}"
    if weight.device.type != "meta":
        resolve(config.executor, weight.device)
        if match.grouped:
            try:
                resolve(config.executor, weight.device, groups=True)
            except ExecutorError as error:  # of this matmul alone
                return str(error)
    return None


def run(rewrite: Rewrite) -> int:
    """Moves what is not legal from `matches` to `refusals`; returns how many."""
    matches, rewrite.matches = rewrite.matches, []
    differentiated = rewrite.facts.forward_mode
    for match in matches:
        reason = rewrite.barred or can_rewrite(match, rewrite.config)
        if reason is None and match.node in differentiated:
            reason = FORWARD_MODE
        if reason is None:
            rewrite.matches.append(match)
        else:
            rewrite.refuse(match, reason)
    return len(matches) - len(rewrite.matches)
