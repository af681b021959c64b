"""The passes over Inductor's own graphs, by the name of Inductor's option that runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import fx

from fp8fx.passes.inductor import (
    amax_by_rows,
    invert_once,
    keep_unbacked,
    own_outputs,
    share,
    sigmoid_of_gelu,
    sines_once,
    store_once,
    wgrad_first,
    whole_cat,
)

__all__ = ["HOOKS", "REQUIRED"]

HOOKS: Mapping[str, tuple[Callable[[fx.Graph], None], ...]] = {
    "joint_custom_pre_pass": (own_outputs.run, share.run, keep_unbacked.run),
    "post_grad_custom_post_pass": (
        sigmoid_of_gelu.run,
        whole_cat.run,
        amax_by_rows.run,
        store_once.run,
        sines_once.run,
        invert_once.run,
        wgrad_first.run,
    ),
}

REQUIRED = frozenset({own_outputs.run})
"""Passes without which a graph gives wrong results: if one fails, the compilation fails."""
