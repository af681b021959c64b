"""Inductor with our passes: hooks, what to do if one fails, and the compile caches' keys."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import fx

from fp8fx.config import Config
from fp8fx.errors import ConfigError, FP8Warning, unknown
from fp8fx.executors.row_major import verdicts
from fp8fx.graph.copies import copy_graph
from fp8fx.passes.inductor import HOOKS
from fp8fx.torch_internals import (
    CustomGraphPass,
    InferenceAwarePass,
    RestartAnalysis,
    SkipFrame,
    get_hash_for_files,
    inductor_config,
    inductor_settings,
    list_mode_options,
)

__all__ = ["FOR_DYNAMO", "GraphPass", "hooks_of", "inductor_patches", "inner_compile_with", "warn_of_failed"]

log = logging.getLogger("fp8fx")


@functools.cache
def _sources() -> bytes:
    root = Path(__file__).parent
    files = [*root.rglob("*.py"), *(root / "passes").resolve().rglob("*.py")]  # rglob follows no link
    return get_hash_for_files(tuple(sorted(map(str, files))))


GraphPass = Callable[..., None]


def _is_ours(one: GraphPass) -> bool:
    return (getattr(one, "__module__", None) or "").startswith("fp8fx.passes.")


def warn_of_failed(passes: Sequence[GraphPass], error: Exception) -> str:
    """Says that a graph is compiled without these passes; returns which and why."""
    names = ", ".join(one.__module__.rpartition(".")[2] for one in passes)
    why = f"{names}: {type(error).__name__}: {error}"
    log.warning("a pass failed", exc_info=error)
    warnings.warn(f"fp8: a graph is compiled without a pass that failed, {why}", FP8Warning, stacklevel=2)
    return why


_Failed = Callable[[Sequence[GraphPass], Exception], Any]


@InferenceAwarePass.register
class _Hook(CustomGraphPass):
    """Passes over Inductor's own graphs, the user's before ours; the uuid puts our sources and configuration into the compile caches' keys.

    One of ours that fails leaves the graph as it was, and `failed` is told. Then it is left out, in this graph or, if `again`, in
    another compilation: the error goes on.
    """

    def __init__(
        self, config: Config, passes: Sequence[GraphPass], failed: _Failed = warn_of_failed, again: bool = False
    ) -> None:
        self.config, self.passes, self.failed, self.again = config, passes, failed, again
        self.ours = [one for one in passes if _is_ours(one)]
        self.left_out: list[GraphPass] = []

    def __call__(self, graph: fx.Graph, **known: Any) -> None:
        owner = graph.owning_module
        for one in self.passes:
            if owner is None or not _is_ours(one):
                # A pass may put a new graph in its place.
                one(graph if owner is None else owner.graph, **(known if isinstance(one, InferenceAwarePass) else {}))
        if owner is not None:
            self._run(owner)

    def _run(self, owner: fx.GraphModule) -> None:
        before = copy_graph(owner.graph)
        for one in self.ours:
            try:
                if one not in self.left_out:
                    one(owner.graph)
            except Exception as error:
                owner.graph = before  # it may have done half of its work
                self.left_out.append(one)
                self.failed([one], error)
                if self.again:
                    raise
                self._run(owner)
                return

    def uuid(self) -> Any:
        others = [one for one in self.passes if not _is_ours(one)]
        keys = [one.uuid() if isinstance(one, CustomGraphPass) else None for one in others]
        return None if None in keys else (_sources(), self.config.key(), verdicts(), *keys)


_INSIDE = "post_grad_custom_post_pass"
"""The hook that runs in what compiles one graph, forward or backward; the other runs before."""


def hooks_of(config: Config, patches: Mapping[str, Any], failed: _Failed) -> dict[str, _Hook]:
    """HOOKS as Inductor's options, behind whatever passes the user has there."""
    hooks = {}
    for name, passes in HOOKS.items():
        own = patches.get(name, getattr(inductor_config, name))
        before = own if isinstance(own, (list, tuple)) else () if own is None else (own,)
        hooks[name] = _Hook(config, (*before, *passes), failed, again=name == _INSIDE)
    return hooks


FOR_DYNAMO = RestartAnalysis, SkipFrame
"""Raised for Dynamo, which traces again, or not at all."""


_UNCACHED = {"fx_graph_cache": False, "fx_graph_remote_cache": False}
"""Without these keys AOTAutograd caches nothing either."""


def inner_compile_with(
    compile_graph: Callable[..., Any], hooks: Mapping[str, _Hook], failed: _Failed
) -> Callable[..., Any]:
    """Inductor's compilation of one graph, forward or backward, which starts again without a pass of ours that fails.

    It starts again without any of them if Inductor itself fails. What lacks a pass is not cached: its key would be that of
    the graph with all of them.

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
            count = len(inside.left_out)
            try:
                with inductor_config.patch(_UNCACHED if any(hook.left_out for hook in hooks.values()) else {}):
                    compiled = compile_graph(gm, example_inputs, **kwargs)
                break
            except FOR_DYNAMO:
                raise
            except Exception as error:
                if count == len(inside.ours):
                    raise
                if count == len(inside.left_out):
                    blamed, blame = [one for one in inside.ours if one not in inside.left_out], error
                    inside.left_out = [*inside.left_out, *blamed]
            for module, graph in graphs.items():
                module.graph = copy_graph(graph)
        if blame is not None:
            failed(blamed, blame)
        return compiled

    return inner_compile


def inductor_patches(mode: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    if mode is not None and mode not in list_mode_options():
        raise unknown("mode", mode, list_mode_options())
    valid = inductor_config.get_config_copy()
    for name in options:
        if name.replace("-", "_") not in valid:
            raise ConfigError(
                f"{unknown('option', name, ('mode', *Config.names()))} "
                "Inductor's own options pass through too: torch._inductor.list_options() lists them."
            )
    # Inductor's own reading of a mode and of option types.
    try:
        patches = inductor_settings(mode, options)
    except RuntimeError as error:
        raise ConfigError(str(error)) from error
    return patches
