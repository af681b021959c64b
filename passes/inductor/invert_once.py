"""invert_once: the reciprocal of a tensor's scale is computed once, on Inductor's final graph.

    r = float(reciprocal(double(scale))); q = cast(mul(x, r))
    ->
    r = as_strided(float(reciprocal(double(scale))), [], []); q = cast(mul(x, r))

Inductor inlines r into each cast: every thread would do the division again, in float64. What as_strided reads has to
lie in memory, so r is computed once, with the scale. The cast of a weight only waits for memory and hides the division:
it is left alone.
"""

from __future__ import annotations

import torch
from torch import fx

from fp8fx.recipes.pattern import casts_stored, inverses_of_scales

__all__ = ["run"]

aten = torch.ops.aten


def _store(inverse: fx.Node) -> None:
    """Has all that reads `inverse` read it from memory."""
    graph = inverse.graph
    with graph.inserting_after(inverse):
        stored = graph.call_function(aten.as_strided.default, (inverse, [], []))
    stored.meta = dict(inverse.meta)
    inverse.replace_all_uses_with(stored, delete_user_cb=lambda user: user is not stored)


def run(graph: fx.Graph) -> None:
    """Inserts the stores, in place."""
    for inverse in inverses_of_scales(graph):
        if not all(map(casts_stored, inverse.users)):
            _store(inverse)
