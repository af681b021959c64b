"""The passes, one a file, and the pipeline: what runs, in which order."""

from __future__ import annotations

if __name__ == "passes":
    raise ImportError("this folder is fp8fx's; import it as fp8fx.passes")

from collections.abc import Callable, Mapping

from torch import fx

from fp8fx.passes import (
    amax_by_rows,
    check,
    decide,
    expand,
    freeze,
    invert_once,
    keep_unbacked,
    match,
    merge,
    replace,
    share,
    store_once,
    wgrad_first,
)
from fp8fx.rewrite import Pass

__all__ = ["HOOKS", "PIPELINE"]

PIPELINE: tuple[Pass, ...] = (
    expand,  # a fused call that hides linears -> the calls that it is made of
    match,  # every matmul: a linear, or a refusal with its reason
    check,  # is it legal?
    decide,  # does the user want it, and is it worth it?
    replace,  # a linear -> an FP8 op
    merge,  # with freeze: siblings -> one op
    freeze,  # with freeze: its weight, quantized now
)

HOOKS: Mapping[str, tuple[Callable[[fx.Graph], None], ...]] = {
    # What Inductor runs on its own graphs, by the name of its option.
    "joint_custom_pre_pass": (share.run, keep_unbacked.run),
    "post_grad_custom_post_pass": (amax_by_rows.run, store_once.run, invert_once.run, wgrad_first.run),
}
