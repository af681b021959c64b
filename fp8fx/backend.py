"""The torch.compile backend: convert, then Inductor."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from fp8fx.capture import run_captured, without_compiler
from fp8fx.config import Config
from fp8fx.convert import rewritten
from fp8fx.errors import ConfigError, ExecutorError, FP8Warning, FreezeError, GraphError
from fp8fx.layers import layers_compiled_once, schemas_found_once
from fp8fx.lowering import (
    FOR_DYNAMO,
    GraphPass,
    compile_as_it_is,
    compile_rewritten,
    inductor_settings_of,
    warn_of_failed,
)
from fp8fx.notice import Notice
from fp8fx.passes.rewrite import PIPELINE, freeze
from fp8fx.pipeline import Pass
from fp8fx.prologue import Prologued, split
from fp8fx.report import Report
from fp8fx.torch_internals import (
    ConstantSource,
    parameter_sources,
    set_parameter_sources,
)
from fp8fx.torch_versions import warn_of_untested
from fp8fx.unseen import Unseen

__all__ = ["Backend", "explain", "fp8"]

log = logging.getLogger("fp8fx")

_ASKED_FOR = ConfigError, ExecutorError, FreezeError
"""Raised if what was asked for cannot be had."""


def _has_ops(gm: fx.GraphModule) -> bool:
    """Whether the graph calls ops of ours.

    That of a model that was converted before does, or of one that holds modules of `fp8fx.nn`.
    """
    return any(str(node.target).startswith("fp8fx.") for node in gm.graph.nodes if node.op == "call_function")


def _hand_over(gm: fx.GraphModule) -> None:
    """Tells AOTAutograd where the graph's own frozen tensors are from."""
    if (sources := parameter_sources(gm)) is not None:
        parameters = gm.named_parameters(remove_duplicate=False)
        buffers = gm.named_buffers(remove_duplicate=False)
        own = {name: ConstantSource(f"fp8fx.{name}") for name, _ in itertools.chain(parameters, buffers)}
        set_parameter_sources(gm, own | sources)


def _failure(error: Exception) -> Report:
    """That of a graph which is compiled as it was."""
    return Report((), failures=(f"{type(error).__name__}: {error}",))


def _rewritten(
    gm: fx.GraphModule, example_inputs: Sequence[Any], config: Config, passes: Sequence[Pass] = PIPELINE
) -> tuple[fx.GraphModule, Report]:
    """`rewritten`, or the graph as it is if that fails: the user's model must not suffer from a fault of ours."""
    try:
        return rewritten(gm, example_inputs, config, passes)
    except _ASKED_FOR:
        raise
    except Exception as error:
        log.warning("the rewrite of a graph failed", exc_info=True)
        return gm, _failure(error)


class _ReportSlot:
    """A graph's report among a backend's, which may still change: a pass may fail only when backward is compiled."""

    def __init__(self, report: Report, reports: list[Report]) -> None:
        self.report = report
        self._reports = reports
        reports.append(report)

    def __deepcopy__(self, memo: dict[int, Any]) -> _ReportSlot:
        # Inductor may copy its settings, which have the hooks that tell it of failures.
        return self

    def replace(self, report: Report) -> None:
        """Puts another report in its place, if torch._dynamo.reset() has not cleared the list."""
        self._reports[:] = [report if other is self.report else other for other in self._reports]
        self.report = report

    def skip(self, passes: Sequence[GraphPass], error: Exception) -> None:
        """Warns that the graph is compiled without these passes, and reports it."""
        skipped = warn_of_failed(passes, error)
        self.replace(dataclasses.replace(self.report, skipped=(*self.report.skipped, skipped)))


def _compile(
    gm: fx.GraphModule, inputs: Sequence[Any], config: Config, settings: Mapping[str, Any], slot: _ReportSlot
) -> Callable[..., Any]:
    """Compiles a graph that has FP8 ops, layers that repeat once; if that fails, each layer."""
    if config.layers == "once":
        try:
            layered = layers_compiled_once(gm, inputs)
            if layered is not None:
                with schemas_found_once():
                    return compile_rewritten(layered, inputs, config, settings, slot.skip, has_bodies=True)
        except (*_ASKED_FOR, *FOR_DYNAMO):
            raise
        except Exception:
            log.warning("layers cannot be compiled once; each is compiled", exc_info=True)
    return compile_rewritten(gm, inputs, config, settings, slot.skip)


class Backend:
    """A torch.compile backend: `torch.compile(model, backend=fp8fx.Backend(config))`.

    Args:
        config: what to rewrite and how; the default rewrites by the `mixed` recipe whatever is legal and gains from it.

    Attributes:
        reports: the Report of every graph compiled so far, in order.

    Raises:
        ConfigError: `config` is not a Config.

    >>> import torch
    >>> from fp8fx.config import Config
    >>> backend = Backend(Config(recipe="rowwise", exclude="1"))
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 64))
    >>> print(backend.explain(model, torch.randn(32, 64)).summary)
    1 of 2 matmuls rewritten, share of the matmul FLOPs: 50.0%
    """

    def __init__(self, config: Config | None = None) -> None:
        warn_of_untested()
        self.config = Config.of(config, {})
        self.reports: list[Report] = []

    def __call__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Callable[..., Any]:
        """Compiles one graph of Dynamo's.

        Args:
            gm, example_inputs: as Dynamo gives them.
            mode: as torch.compile's: `reduce-overhead`, `max-autotune`, ...
            options: fields of Config by name, `mode` (torch.compile takes mode or options, not both), or Inductor's own
                options.

        Raises:
            ConfigError: an unknown option, mode or value.
            ExecutorError: the executor asked for by name cannot run where the weights are.
            FreezeError: a weight that is to be frozen requires grad in grad mode, or is not finite.
                torch.compile wraps each of them in its BackendCompilerFailed.
        """
        config, settings = self._read(mode, options)
        new, report = _rewritten(gm, example_inputs, config)
        inputs, prologue = split(new, example_inputs)
        _hand_over(new)
        slot = _ReportSlot(report, self.reports)
        compiled: Callable[..., Any] | None = None
        if report.rewritten or _has_ops(new):
            try:
                compiled = _compile(new, inputs, config, settings, slot)
            except (*_ASKED_FOR, *FOR_DYNAMO):
                raise
            except Exception as error:
                log.warning("a rewritten graph cannot be compiled", exc_info=True)
                slot.replace(_failure(error))
                new, inputs, prologue = gm, example_inputs, None
                _hand_over(new)
        report = slot.report
        if compiled is None:
            if report.failures:
                text = f"fp8: in this graph {report.summary}; fp8fx.explain(model, *args) gives the reasons"
                warnings.warn(text, FP8Warning, stacklevel=2)
            compiled = compile_as_it_is(new, inputs, settings)
        Notice.take(gm, report, is_settled=bool(report.rewritten or report.failures) or _has_ops(new))
        return compiled if prologue is None else Prologued(prologue, compiled)

    def _read(self, mode: str | None, options: Mapping[str, Any] | None) -> tuple[Config, dict[str, Any]]:
        """The configuration of the rewrite, and Inductor's settings."""
        inductors = dict(options or {})
        mode = inductors.pop("mode", mode)
        ours = {name: inductors.pop(name) for name in Config.names() if name in inductors}
        return Config.of(self.config, ours), inductor_settings_of(mode, inductors)

    def __deepcopy__(self, memo: dict[int, Any]) -> Backend:
        # As a function is: a copy of what it compiled runs the same code, and another backend's would be compiled anew.
        return self

    def reset(self) -> None:
        """Called by torch._dynamo.reset()."""
        self.reports.clear()

    def explain(self, model: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
        """What this backend would rewrite when `model` is called with these arguments.

        It runs the model once, as it is, and compiles nothing. The linears of `model` that are in none of its graphs
        have a row each, if it is a module, a method of one, or either compiled.

        Raises:
            GraphError: `model` cannot be called.
            ExecutorError: the executor asked for by name cannot run where the weights are; in torch's
                BackendCompilerFailed.
        """
        if not callable(model):
            kind = type(model).__name__
            raise GraphError(f"explain got a {kind}; expected a module or function, and what it is called with")
        reports: list[Report] = []
        called = without_compiler(model)
        unseen = Unseen(called)
        passes = [rewrite_pass for rewrite_pass in PIPELINE if rewrite_pass is not freeze]

        def collect(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
            unseen.read(gm, example_inputs)
            _, report = _rewritten(gm, example_inputs, self.config, passes)
            reports.append(report)

        run_captured(called, collect, *args, **kwargs)
        return unseen.added_to(Report.merged(reports))


def fp8(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """`torch.compile(model, backend="fp8", mode=..., options=...)`: a Backend with the default configuration."""
    return Backend()(gm, example_inputs, mode=mode, options=options)


def explain(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """What `torch.compile(model, backend="fp8")` rewrites when called with these arguments, and what not and why.

    It runs the model once, as it is. For another configuration: `fp8fx.Backend(config).explain(model, ...)`.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64))
    >>> report = explain(model, torch.randn(32, 64))
    >>> [(row.path, row.op, row.bsz) for row in report.rows]
    [('0', 'matmul_fp8_mixed', 64), ('2', 'matmul_fp8_mixed', 128)]

    Raises:
        GraphError: `model` cannot be called.
    """
    return Backend().explain(model, *args, **kwargs)
