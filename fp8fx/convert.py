"""convert(gm): the rewrite on any FX GraphModule."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

from torch import fx, nn
from torch.export import ExportedProgram

from fp8fx.config import Config
from fp8fx.errors import GraphError
from fp8fx.graph.bodies import bodies, call_instead
from fp8fx.graph.copies import copy, put, take_over
from fp8fx.graph.values import attribute, unused
from fp8fx.linears.weight_operand import weight_behind
from fp8fx.passes.rewrite import PIPELINE
from fp8fx.pipeline import Pass, Rewrite, run
from fp8fx.profit.times import times_on
from fp8fx.reasons import Because
from fp8fx.report import Report
from fp8fx.torch_versions import warn_of_untested
from fp8fx.weights.converted_module import META, FrozenModule
from fp8fx.weights.hoist import hoist, reads_of_weights
from fp8fx.weights.store import STORE

__all__ = ["convert", "rewritten"]

log = logging.getLogger("fp8fx")


def rewritten(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any] | None,
    config: Config,
    passes: Sequence[Pass] = PIPELINE,
    barred: Because | None = None,
) -> tuple[fx.GraphModule, Report]:
    """The rewritten copy of `gm`, and the account of it. The bodies of its higher-order operators are included.

    If `barred` says why, none of its linears is rewritten.
    """
    rewrite = Rewrite(copy(gm), config, example_inputs, barred, STORE, times_on)
    run(rewrite, passes)
    reports = [Report.of(rewrite)]
    inner = list(bodies(rewrite.gm, lambda node: weight_behind(node, rewrite.weights), rewrite.own))
    # Where a body is, by its name and what of it is changed, which one call may want and another not.
    places: dict[tuple[str, object], str] = {}
    calls: dict[str, list[fx.Node]] = {}
    for body in inner:
        new_body, report = rewritten(body.gm, None, config, passes, barred or body.barred)
        became = tuple(row.became for row in report.attention)
        key = body.name, (tuple(row.gemms for row in report.rows), became)
        if key not in places:
            is_variant = any(name == body.name for name, _ in places)
            places[key] = unused(rewrite.gm, body.name) if is_variant else body.name
            if is_variant or report.rewritten or any(became) or reads_of_weights(new_body.graph):
                put(rewrite.gm, places[key], new_body)
        if places[key] != body.name:
            call_instead(body, places[key])
        calls.setdefault(places[key], []).append(body.call)
        reports.append(report)
    hoisted = [place for place in calls if hoist(attribute(rewrite.gm, place), calls[place])]
    if hoisted or any(place != name for (name, _), place in places.items()):
        rewrite.gm.recompile()
    report = dataclasses.replace(Report.merged(reports), graphs=1)
    log.info("%s", report)
    return rewrite.gm, report


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # otherwise a view of a buffer is a constant of its own


def _trace(model: nn.Module) -> fx.Graph:
    try:
        return _Tracer().trace(model)
    except Exception:  # its forward reads a buffer's values or shape in Python
        return fx.Tracer().trace(model)


def _graph_module(model: object) -> fx.GraphModule:
    if isinstance(model, fx.GraphModule):
        return model
    if isinstance(model, ExportedProgram):
        return model.module()
    if not isinstance(model, nn.Module):
        raise GraphError(
            f"convert got a {type(model).__name__}; expected a GraphModule, an ExportedProgram or an nn.Module"
        )
    before = set(model.__dict__)
    try:
        gm = fx.GraphModule(model, _trace(model), type(model).__name__)
    except Exception as error:
        raise GraphError(
            f"symbolic_trace cannot trace {type(model).__name__} ({error}); "
            'pass torch.export.export(model, args), or use torch.compile(model, backend="fp8")'
        ) from error
    take_over(gm, model)
    for name in model.__dict__.keys() - before:  # symbolic_trace leaves the graph's constants on the model
        del model.__dict__[name]
    return gm


def convert(
    gm: fx.GraphModule | ExportedProgram | nn.Module,
    example_inputs: Sequence[Any] | None = None,
    config: Config | None = None,
    **options: Any,
) -> fx.GraphModule:
    """A copy of the graph whose linears are FP8 matmul ops.

    Args:
        gm: from symbolic_trace, Dynamo, torch.export or make_fx; an ExportedProgram; or a module that symbolic_trace
            can trace.
        example_inputs: one for each of the graph's inputs, in order. They let the report tell M, and are needed only if
            a weight is an input of the graph (a Parameter among them is a weight).
        config: what to rewrite and how; `options` are its fields by name, and win.

    Returns:
        A new GraphModule with the same signature and the same parameters (shared, not copied). With `freeze`, weights
        are `fp8fx.FP8Weight` instead. It takes the state dict of the model as it was, whose weights are quantized. The
        input is untouched. `meta["fp8fx_report"]` holds its Report.

    Raises:
        GraphError: not a model, not traceable, or the example inputs do not fit.
        ConfigError: an unknown option or value.
        ExecutorError: the executor asked for by name cannot run where the weights are.
        FreezeError: a weight that is to be frozen requires grad in grad mode, or is not finite.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64))
    >>> gm = convert(model, recipe="rowwise", exclude="2")
    >>> [(row.name, row.op, row.reason) for row in gm.meta["fp8fx_report"].rows]
    [('0.weight', 'matmul_fp8_rowwise', None), ('2.weight', None, "excluded by '2'")]
    """
    warn_of_untested()
    settings = Config.of(config, options)
    if example_inputs is not None and not isinstance(example_inputs, (tuple, list)):
        raise GraphError(
            f"example_inputs is a {type(example_inputs).__name__}; expected a tuple or list, one for each input"
        )
    new, report = rewritten(_graph_module(gm), example_inputs, settings)
    new.meta["fp8fx_report"] = report
    return FrozenModule.of(new) if META in new.meta else new
