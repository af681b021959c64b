"""freeze(model): the weights of a model's linears in FP8, in place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fp8fx.capture import without_compiler
from fp8fx.config import Config
from fp8fx.errors import FreezeError
from fp8fx.linears.filters import why_filtered
from fp8fx.ops.fp8_weight import FP8Weight
from fp8fx.ops.operands import DTYPES
from fp8fx.ops.register import name_of
from fp8fx.reasons import Because, OperandReason, WorthReason
from fp8fx.report import Report, Row
from fp8fx.used_weights import used_weights
from fp8fx.weights.linear_weights import Slot, linear_weights
from fp8fx.weights.saved import attach, check_name_of_scale
from fp8fx.weights.state_dicts import uncompiled
from fp8fx.weights.unsaved import refuse_save_pretrained

__all__ = ["freeze", "why_not"]


def freeze(
    model: nn.Module,
    recipe: str = "rowwise",
    *,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
    min_features: int = 0,
    routers: bool = False,
    inputs: Sequence[Any] | None = None,
) -> Report:
    """Quantizes the weights of a model's linears, in place and one by one, for inference or to train adapters.

    Afterwards each of them is an `fp8fx.FP8Weight`: a parameter of half the size. The model runs as before, eagerly, by
    `torch.compile(model)` and best by `torch.compile(model, backend="fp8")`; it is moved, copied, saved and loaded as
    before. A state dict in high precision that is loaded is quantized. So a model on the meta device can be frozen
    first and loaded later, and is never whole in high precision.

    Weights are those of `nn.Linear` and `nn.MultiheadAttention`, and of transformers' Conv1D and experts. Those of
    other modules, such as a parameter that is read as `x @ self.w`, show in a call alone: pass its `inputs`. A weight
    that is tied to something else, such as an embedding, stays there in high precision.

    `save_pretrained` raises FreezeError afterwards: `from_pretrained` would take the FP8 codes for values. To save a
    transformers model so, use `fp8fx.transformers.freeze`.

    Args:
        model: on a CPU, a GPU or the meta device; as given to torch.compile or as it came back.
        recipe: the name of one of `fp8fx.recipes.recipe.RECIPES`.
        include, exclude: fnmatch patterns of module paths or weights' names; `exclude` wins.
        min_features: a weight with K or N below this is left alone.
        routers: with `inputs`, also take weights by which topk chooses experts.
        inputs: the positional arguments of a call. The model is run with them once, as it is.

    Returns:
        A Report with a row for each weight.

    Raises:
        GraphError: `model` is no nn.Module.
        ConfigError: an unknown recipe, or a value that is none.
        FreezeError: a weight requires grad in grad mode, or is not finite. Nothing has been changed then.

    >>> model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32)).requires_grad_(False)
    >>> report = freeze(model, exclude="2")
    >>> [(row.name, row.reason) for row in report.rows]
    [('0.weight', None), ('2.weight', "excluded by '2'")]
    >>> model[0].weight
    FP8Weight((128, 64), recipe='rowwise', dtype=torch.float32, device='cpu')
    >>> sorted(model.state_dict())
    ['0.bias', '0.weight', '0.weight_scale', '2.bias', '2.weight']
    """
    model = uncompiled(model, "freeze")
    config = Config(
        recipe=recipe,
        include=include,  # type: ignore[arg-type]
        exclude=exclude,  # type: ignore[arg-type]
        min_features=min_features,
        routers=routers,
    )
    slots = list(linear_weights(model))
    choosing: set[int] = set()
    if inputs is not None:
        used, choosing = used_weights(model, without_compiler(model), inputs, config)
        told = {(slot.module, slot.attribute) for slot in slots}
        slots += [slot for slot in used if (slot.module, slot.attribute) not in told]
    reasons = [why_not(slot, config, is_router=id(slot.tensor) in choosing) for slot in slots]
    rows = tuple(_row(slot, recipe, reason) for slot, reason in zip(slots, reasons, strict=True))
    wanted = [slot for slot, reason in zip(slots, reasons, strict=True) if reason is None]
    _check(wanted)
    for shared in _by_tensor(wanted):
        first = shared[0]
        weight = FP8Weight(first.tensor, recipe, transposed=first.transposed)
        for slot in shared:
            slot.module.register_parameter(slot.attribute, weight)  # type: ignore[arg-type]
    attach(model)
    refuse_save_pretrained(model)
    return Report(rows)


def why_not(slot: Slot, config: Config, is_router: bool = False) -> Because | None:
    """Why a weight is left alone; None if it becomes FP8."""
    reason = why_filtered(slot.path, slot.name, slot.k, slot.n, config)
    if reason is None and is_router and not config.routers:
        reason = WorthReason.ROUTER()
    if reason is None and slot.tensor.dtype not in DTYPES:
        reason = OperandReason.DTYPE(operand="weight", dtype=str(slot.tensor.dtype).removeprefix("torch."))
    return reason


def _check(slots: Iterable[Slot]) -> None:
    for slot in slots:
        x = slot.tensor
        if isinstance(x, FP8Weight):
            continue
        check_name_of_scale(slot.attribute, {**slot.module._parameters, **slot.module._buffers})
        if x.requires_grad and torch.is_grad_enabled():
            raise FreezeError(
                f"{slot.name} requires grad, and an FP8 weight is not trained: call model.requires_grad_(False) first, "
                "or freeze under torch.no_grad(); nothing was changed"
            )
        if not x.is_meta and not bool(x.isfinite().all()):
            raise FreezeError(f"{slot.name}: inf or NaN; expected finite weights, nothing was changed")


def _by_tensor(slots: Iterable[Slot]) -> list[list[Slot]]:
    """The slots of each parameter that is not FP8 yet. No parameter is kept alive by it."""
    groups: dict[int, list[Slot]] = {}
    for slot in slots:
        if not isinstance(slot.tensor, FP8Weight):
            groups.setdefault(id(slot.tensor), []).append(slot)
    return list(groups.values())


def _row(slot: Slot, recipe: str, reason: Because | None) -> Row:
    x: Tensor = slot.tensor
    recipe = x.recipe if isinstance(x, FP8Weight) else recipe
    op = name_of("grouped_mm" if x.dim() == 3 else "matmul", recipe)
    return Row(
        path=slot.path,
        name=slot.name,
        form=slot.form,
        m="?",
        k=str(slot.k),
        n=str(slot.n),
        bsz=None,
        bsz2=None,
        op=op if reason is None else None,
        executor=None,
        gemms=("forward",) if reason is None else (),
        reason=None if reason is None else str(reason),
        remark="",
        flops=None,
        kind=None if reason is None else reason.kind,
    )
