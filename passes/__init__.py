"""The passes, one a file, and the pipeline: what runs, in which order."""

from __future__ import annotations

if __name__ == "passes":
    raise ImportError("this folder is fp8fx's; import it as fp8fx.passes")

from fp8fx.passes import check, decide, match, replace
from fp8fx.rewrite import Pass

__all__ = ["PIPELINE"]

PIPELINE: tuple[Pass, ...] = (
    match,  # every matmul: a linear, or a refusal with its reason
    check,  # is it legal?
    decide,  # does the user want it?
    replace,  # the only one that changes the graph
)
