"""The torch.compile backend: convert, then Inductor."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx
from torch.nn import Parameter

from fp8fx.config import Config
from fp8fx.convert import rewritten
from fp8fx.errors import ConfigError, ExecutorError, FP8Warning, FreezeError, GraphError
from fp8fx.graph.names import name_of
from fp8fx.inductor import FOR_DYNAMO, GraphPass, hooks_of, inductor_patches, inner_compile_with, warn_of_failed
from fp8fx.notice import Notice
from fp8fx.passes.rewrite import PIPELINE, freeze
from fp8fx.pipeline import Pass
from fp8fx.report import Report
from fp8fx.torch_internals import (
    ConstantSource,
    compile_fx,
    compile_fx_inner,
    dynamo_config,
    functorch_config,
    innermost_fn,
    parameter_sources,
    set_parameter_sources,
    uncompiled_call,
    warn_of_untested,
)
from fp8fx.unseen import Unseen
from fp8fx.weights.store import STORE, GraphHandle

__all__ = ["Backend", "explain", "fp8", "log"]

log = logging.getLogger("fp8fx")


_ASKED_FOR = ConfigError, ExecutorError, FreezeError
"""Raised if what was asked for cannot be had."""


def _has_ops(gm: fx.GraphModule) -> bool:
    """Whether the graph calls ops of ours, as that of a model that was converted before or holds modules of `fp8fx.nn` does unrewritten."""
    return any(str(node.target).startswith("fp8fx.") for node in gm.graph.nodes if node.op == "call_function")


def _hand_over(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
    """Tells the store which parameters the graph reads as they are, and AOTAutograd where its frozen tensors come from."""
    for node, x in zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=False):
        if node.users and isinstance(x, Parameter):
            STORE.keep(name_of(node), x, GraphHandle.of(gm))
    if (sources := parameter_sources(gm)) is not None:
        held = itertools.chain(gm.named_parameters(remove_duplicate=False), gm.named_buffers(remove_duplicate=False))
        set_parameter_sources(gm, {name: ConstantSource(f"fp8fx.{name}") for name, _ in held} | sources)


def _failure(error: Exception) -> Report:
    """That of a graph which is compiled as it was."""
    return Report((), failures=(f"{type(error).__name__}: {error}",))


def _rewritten(
    gm: fx.GraphModule, example_inputs: Sequence[Any], config: Config, passes: Sequence[Pass] = PIPELINE
) -> tuple[fx.GraphModule, Report]:
    """`rewritten`, or the graph as it is where that fails: a fault of ours is none of the user's model."""
    try:
        return rewritten(gm, example_inputs, config, passes)
    except _ASKED_FOR:
        raise
    except Exception as error:
        log.warning("the rewrite of a graph failed", exc_info=True)
        return gm, _failure(error)


def _uncompiled(called: Any) -> Any:
    """What torch.compile was given, which would compile it by its own backend; `called` if it was not compiled."""
    called = innermost_fn(getattr(called, "_orig_mod", called))
    return called if (call := uncompiled_call(called)) is None else call


class Backend:
    """A torch.compile backend: `torch.compile(model, backend=fp8fx.Backend(config))`.

    Args:
        config: what to rewrite and how; the default rewrites by the `mixed` recipe whatever is legal and gains from it.

    Attributes:
        reports: the Report of every graph compiled so far, in order.

    Raises:
        ConfigError: `config` is not a Config.
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
            options: fields of Config by name, `mode` (torch.compile takes mode or options, not both), or Inductor's own options.

        Raises:
            ConfigError: an unknown option, mode or value.
            ExecutorError: the executor asked for by name cannot run where the weights are.
            FreezeError: a weight that is to be frozen requires grad in grad mode, is not finite, or was released.
                torch.compile wraps each of them in its BackendCompilerFailed.
        """
        given = dict(options or {})
        mode = given.pop("mode", mode)
        ours = {name: given.pop(name) for name in Config.names() if name in given}
        config, patches = Config.of(self.config, ours), inductor_patches(mode, given)
        new, report = _rewritten(gm, example_inputs, config)
        _hand_over(new, example_inputs)
        self.reports.append(report)

        def correct(right: Report) -> None:
            nonlocal report
            old, report = report, right
            self.reports[:] = [right if other is old else other for other in self.reports]

        def failed(passes: Sequence[GraphPass], error: Exception) -> None:  # perhaps only when backward is compiled
            correct(dataclasses.replace(report, skipped=(*report.skipped, warn_of_failed(passes, error))))

        compiled: Any = None
        if report.rewritten or _has_ops(new):
            hooks = hooks_of(config, patches, failed)
            try:
                # AOTAutograd saves an activation that backward multiplies in high precision, since a forward GEMM has read it from
                # memory anyway. An FP8 GEMM has not: to recompute it costs the very store that saving it would.
                with functorch_config.patch(ban_recompute_materialized_backward=False):
                    inner = inner_compile_with(compile_fx_inner, hooks, failed)
                    compiled = compile_fx(new, example_inputs, inner, config_patches={**patches, **hooks})
            except (*_ASKED_FOR, *FOR_DYNAMO):
                raise
            except Exception as error:
                log.warning("a rewritten graph cannot be compiled", exc_info=True)
                correct(_failure(error))
                new = gm
                _hand_over(new, example_inputs)
        if compiled is None:
            if report.failures:
                warnings.warn(
                    f"fp8: in this graph {report.summary}; fp8fx.explain(model, *args) gives the reasons",
                    FP8Warning,
                    stacklevel=2,
                )
            compiled = compile_fx(new, example_inputs, config_patches=patches)
        Notice.take(gm, report, is_settled=bool(report.rewritten or report.failures) or _has_ops(new))
        STORE.bind(GraphHandle.of(new), compiled)
        return cast(Callable[..., Any], compiled)

    def __deepcopy__(self, memo: dict[int, Any]) -> Backend:
        return self  # as a function is: a copy of what it compiled runs the same code, and another backend's would be compiled anew

    def reset(self) -> None:
        """Called by torch._dynamo.reset()."""
        self.reports.clear()

    def explain(self, model: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
        """What this backend would rewrite when `model` is called with these arguments: runs it once, as it is, and compiles nothing.

        The linears of `model` that are in none of its graphs have a row each, if it is a module, a method of one, or either compiled.

        Raises:
            GraphError: `model` cannot be called.
            ExecutorError: the executor asked for by name cannot run where the weights are; in torch's BackendCompilerFailed.
        """
        if not callable(model):
            raise GraphError(
                f"explain got a {type(model).__name__}; expected a module or function, and what it is called with"
            )
        reports: list[Report] = []
        called = _uncompiled(model)
        unseen = Unseen(called)

        def collect(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
            unseen.read(gm, example_inputs)
            reports.append(
                _rewritten(gm, example_inputs, self.config, [one for one in PIPELINE if one is not freeze])[1]
            )
            return gm.forward

        def call(*args: Any, **kwargs: Any) -> Any:
            return called(*args, **kwargs)

        # Dynamo caches by code object. One of its own leaves what the user has compiled alone; what a graph break leaves of
        # the model's own frames must not run into the limit, or the report would silently lack them.
        fresh = types.FunctionType(call.__code__.replace(), call.__globals__, "explain", closure=call.__closure__)
        with dynamo_config.patch(recompile_limit=2**31 - 1, accumulated_recompile_limit=2**31 - 1):
            torch.compile(fresh, backend=collect)(*args, **kwargs)
        return unseen.added_to(Report.merged(reports))


def fp8(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """`torch.compile(model, backend="fp8", mode=..., options=...)`: a Backend with the default configuration; see Backend."""
    return Backend()(gm, example_inputs, mode=mode, options=options)


def explain(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """What `torch.compile(model, backend="fp8")` rewrites when called with these arguments, and what not and why.

    Runs the model once, as it is. For another configuration: `fp8fx.Backend(config).explain(model, ...)`.

    Raises:
        GraphError: `model` cannot be called.
    """
    return Backend().explain(model, *args, **kwargs)
