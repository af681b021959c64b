"""A rewritten graph through Inductor, with our passes over Inductor's own graphs, and without one that fails."""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import fx

from fp8fx.config import Config
from fp8fx.errors import ConfigError, FP8Warning, unknown
from fp8fx.executors.row_major import verdicts
from fp8fx.graph.copies import copy_graph
from fp8fx.passes.inductor import HOOKS, REQUIRED
from fp8fx.torch_internals import (
    CustomGraphPass,
    InferenceAwarePass,
    RestartAnalysis,
    SkipFrame,
    compile_fx,
    compile_fx_inner,
    functorch_config,
    get_hash_for_files,
    inductor_config,
    inductor_settings,
    list_mode_options,
)
from fp8fx.whole_rows import whole_rows

__all__ = [
    "FOR_DYNAMO",
    "GraphPass",
    "Hook",
    "compile_as_it_is",
    "compile_rewritten",
    "inductor_settings_of",
    "warn_of_failed",
]

log = logging.getLogger("fp8fx")

GraphPass = Callable[..., None]
"""A function that changes one of Inductor's graphs in place."""

FOR_DYNAMO = RestartAnalysis, SkipFrame
"""Raised for Dynamo, which traces again, or not at all."""

_Failed = Callable[[Sequence[GraphPass], Exception], Any]


@functools.cache
def _sources() -> bytes:
    """A hash of all our sources."""
    root = Path(__file__).parent
    passes = (root / "passes").resolve()  # rglob follows no link
    files = [*root.rglob("*.py"), *passes.rglob("*.py")]
    return get_hash_for_files(tuple(sorted(map(str, files))))


def _is_ours(graph_pass: GraphPass) -> bool:
    return (getattr(graph_pass, "__module__", None) or "").startswith("fp8fx.passes.")


def warn_of_failed(passes: Sequence[GraphPass], error: Exception) -> str:
    """Says that a graph is compiled without these passes; returns which and why."""
    names = ", ".join(graph_pass.__module__.rpartition(".")[2] for graph_pass in passes)
    why = f"{names}: {type(error).__name__}: {error}"
    log.warning("a pass failed", exc_info=error)
    warnings.warn(f"fp8: a graph is compiled without a pass that failed, {why}", FP8Warning, stacklevel=2)
    return why


@InferenceAwarePass.register
class Hook(CustomGraphPass):
    """Passes over Inductor's own graphs, the user's before ours.

    The uuid puts our sources and configuration into the compile caches' keys. A pass of ours that fails leaves the
    graph as it was, and `failed` is told. It is then left out: in this graph or, if `compiles_again`, in another
    compilation, for which the error goes on.
    """

    def __init__(
        self,
        config: Config,
        passes: Sequence[GraphPass],
        failed: _Failed = warn_of_failed,
        compiles_again: bool = False,
    ) -> None:
        self.config = config
        self.ours = [graph_pass for graph_pass in passes if _is_ours(graph_pass)]
        self.users = [graph_pass for graph_pass in passes if not _is_ours(graph_pass)]
        self.left_out: list[GraphPass] = []
        self._failed = failed
        self._compiles_again = compiles_again

    def __call__(self, graph: fx.Graph, **inference: Any) -> None:
        """Runs the passes over the graph, in place."""
        owner = graph.owning_module
        if owner is None:
            for graph_pass in (*self.users, *self.ours):
                graph_pass(graph, **self._arguments(graph_pass, inference))
            return
        for graph_pass in self.users:
            # A pass may put a new graph in its place.
            graph_pass(owner.graph, **self._arguments(graph_pass, inference))
        self._run_ours(owner)

    @staticmethod
    def _arguments(graph_pass: GraphPass, inference: dict[str, Any]) -> dict[str, Any]:
        """What Inductor says of the graph, for a pass that takes it."""
        return inference if isinstance(graph_pass, InferenceAwarePass) else {}

    def _run_ours(self, owner: fx.GraphModule) -> None:
        before = copy_graph(owner.graph)
        for graph_pass in self.ours:
            if graph_pass in self.left_out:
                continue
            try:
                graph_pass(owner.graph)
            except Exception as error:
                if graph_pass in REQUIRED:
                    raise
                owner.graph = before  # it may have done half of its work
                self.left_out.append(graph_pass)
                self._failed([graph_pass], error)
                if self._compiles_again:
                    raise
                self._run_ours(owner)
                return

    def uuid(self) -> Any:
        """The key of this configuration in the compile caches; None, for no caching, if a user's pass has none."""
        keys = [graph_pass.uuid() if isinstance(graph_pass, CustomGraphPass) else None for graph_pass in self.users]
        return None if None in keys else (_sources(), self.config.key(), verdicts(), *keys)


_INSIDE = "post_grad_custom_post_pass"
"""The hook that runs in what compiles one graph, forward or backward. The other runs before."""


def _hooks(config: Config, settings: Mapping[str, Any], failed: _Failed) -> dict[str, Hook]:
    """HOOKS as Inductor's options, behind whatever passes the user has there."""
    hooks = {}
    for name, ours in HOOKS.items():
        users = settings.get(name, getattr(inductor_config, name))
        if users is None:
            users = ()
        elif not isinstance(users, (list, tuple)):
            users = (users,)
        hooks[name] = Hook(config, (*users, *ours), failed, compiles_again=name == _INSIDE)
    return hooks


_UNCACHED = {"fx_graph_cache": False, "fx_graph_remote_cache": False}
"""Without these keys AOTAutograd caches nothing either."""


def _inner_compile(compile_graph: Callable[..., Any], hooks: Mapping[str, Hook], failed: _Failed) -> Callable[..., Any]:
    """Inductor's compilation of one graph, forward or backward, which starts again without a pass of ours that fails.

    It starts again without any of them if Inductor itself fails. What lacks a pass is not cached: its key would be that
    of the graph with all of them.

    Args:
        compile_graph: what Inductor compiles a graph by.
        hooks: our passes over its graphs.
        failed: is told which of them a graph is compiled without, and why.
    """
    inside = hooks[_INSIDE]

    def inner_compile(gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
        # Inductor compiles in place.
        graphs = {module: copy_graph(module.graph) for module in gm.modules() if isinstance(module, fx.GraphModule)}
        blamed: list[GraphPass] = []
        blame: Exception | None = None
        inside.left_out = []
        while True:
            left_out_before = len(inside.left_out)
            is_complete = not any(hook.left_out for hook in hooks.values())
            # What starts again does so without our choices, too.
            keeps_rows = kwargs.get("is_inference", False) and not inside.left_out
            rows = whole_rows() if keeps_rows else contextlib.nullcontext()
            try:
                with inductor_config.patch({} if is_complete else _UNCACHED), rows:
                    compiled = compile_graph(gm, example_inputs, **kwargs)
                break
            except FOR_DYNAMO:
                raise
            except Exception as error:
                if left_out_before == len(inside.ours):
                    raise  # it had none of our passes
                if left_out_before == len(inside.left_out):
                    # No pass failed. Inductor did, perhaps by what a pass made.
                    blame = error
                    blamed = [graph_pass for graph_pass in inside.ours if graph_pass not in inside.left_out]
                    inside.left_out = [*inside.left_out, *blamed]
            for module, graph in graphs.items():
                module.graph = copy_graph(graph)
        if blame is not None:
            failed(blamed, blame)
        return compiled

    return inner_compile


def compile_rewritten(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    config: Config,
    settings: Mapping[str, Any],
    failed: _Failed,
    has_bodies: bool = False,
) -> Callable[..., Any]:
    """Compiles a graph that has FP8 ops.

    Args:
        gm, example_inputs: the rewritten graph and what Dynamo gave it.
        config: of the rewrite; part of the compile caches' keys.
        settings: Inductor's, as `inductor_settings_of` gives them.
        failed: is told which passes a graph is compiled without, and why; perhaps only when backward is compiled.
        has_bodies: whether layers of it are calls of one body.
    """
    hooks = _hooks(config, settings, failed)
    # AOTAutograd saves an activation that backward multiplies in high precision, since a forward GEMM has read it from
    # memory anyway. An FP8 GEMM has not: to recompute it costs the very store that saving it would.
    ours = {"ban_recompute_materialized_backward": False}
    if has_bodies:
        # Before torch 2.15, Inductor took the places of what backward may overwrite for places among a body's inputs.
        ours["donated_buffer"] = False
    with functorch_config.patch(ours):
        inner_compile = _inner_compile(compile_fx_inner, hooks, failed)
        compiled = compile_fx(gm, example_inputs, inner_compile, config_patches={**settings, **hooks})
    return cast(Callable[..., Any], compiled)


def compile_as_it_is(
    gm: fx.GraphModule, example_inputs: Sequence[Any], settings: Mapping[str, Any]
) -> Callable[..., Any]:
    """Compiles a graph without FP8 ops, as `torch.compile(model)` would."""
    return cast(Callable[..., Any], compile_fx(gm, example_inputs, config_patches=dict(settings)))


def inductor_settings_of(mode: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Inductor's own reading of torch.compile's mode and options.

    Raises:
        ConfigError: an unknown mode or option, or a value of another type than Inductor's.
    """
    if mode is not None and mode not in list_mode_options():
        raise unknown("mode", mode, list_mode_options())
    valid = inductor_config.get_config_copy()
    for name in options:
        if name.replace("-", "_") not in valid:
            raise ConfigError(
                f"{unknown('option', name, ('mode', *Config.names()))} "
                "Inductor's own options pass through too: torch._inductor.list_options() lists them."
            )
    try:
        return inductor_settings(mode, options)
    except RuntimeError as error:
        raise ConfigError(str(error)) from error
