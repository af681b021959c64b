"""The graphs of one call, seen by Dynamo as it would compile them. The model runs as it is; nothing is compiled."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fp8fx.torch_internals import dynamo_config, innermost_fn, uncompiled_call

__all__ = ["run_captured", "without_compiler"]


def without_compiler(called: Any) -> Any:
    """What torch.compile was given, which would compile it by its own backend; `called` if it was not compiled."""
    called = innermost_fn(getattr(called, "_orig_mod", called))
    original = uncompiled_call(called)
    return called if original is None else original


def run_captured(
    called: Callable[..., Any],
    collect: Callable[[fx.GraphModule, Sequence[Any]], object],
    *args: Any,
    **kwargs: Any,
) -> None:
    """Calls `called` with these arguments, and `collect` with each of its graphs and what that is called with."""

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        collect(gm, example_inputs)
        return gm.forward

    def call(*args: Any, **kwargs: Any) -> Any:
        return called(*args, **kwargs)

    # Dynamo caches by code object. One of its own leaves what the user has compiled alone. What a graph break leaves of
    # the model's own frames must not run into the limit, or graphs would silently be missing.
    fresh = types.FunctionType(call.__code__.replace(), call.__globals__, "captured", closure=call.__closure__)
    no_limit = 2**31 - 1
    with dynamo_config.patch(recompile_limit=no_limit, accumulated_recompile_limit=no_limit):
        torch.compile(fresh, backend=backend)(*args, **kwargs)
