"""amax_by_rows: the amax of a large tensor is found by long rows first, on Inductor's final graph.

    amax(abs(t(w)))    ->    amax(amax(abs(view(w, [n, 16384])), [1]))    w lies in memory, as a weight does
    amax(abs(f(x)))    ->    amax(amax(abs(f(x)), [-1]))                  f(x) has 8192 features or more

Inductor splits a reduction of a whole tensor into pieces itself: so it reads weights at 2.4 TB/s on an H100, and by
long rows at 2.8. A computed tensor of fewer features is left to it: by such rows it took longer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fp8fx.graph.values import fake, traced_size
from fp8fx.recipes.pattern import amax_of_tensor, behind_views

__all__ = ["run"]

aten = torch.ops.aten


_ROW = 16384
"""Values of a tensor in memory that are reduced together, however long its own rows are."""


_MIN_FEATURES = 8192
"""Values of a row that is computed."""


_MIN_ROWS = 512
"""So that there is work for the whole device."""


def _call(target: Any, x: fx.Node, *args: Any) -> fx.Node:
    """A new node with the meta of its own value."""
    node = x.graph.call_function(target, (x, *args))
    node.meta = {**x.meta, "val": target(x.meta["val"], *args), "original_aten": target}  # which names the kernel
    return node


def _of_input(source: fx.Node) -> fx.Node | None:
    """The amax of each row of a tensor in memory, seen as rows of 16384; None if that would not be faster."""
    value = fake(source)
    if value is None or value.dim() < 2:
        return None
    size = value.numel()
    if not isinstance(size, int) or size % _ROW or size < _ROW * _MIN_ROWS or not value.is_contiguous():
        return None
    rows = _call(aten.view.default, source, [size // _ROW, _ROW])
    return _call(aten.amax.default, _call(aten.abs.default, rows), [1])


def _of_computed(x: fx.Node, magnitudes: fx.Node) -> fx.Node | None:
    """The amax of each row of `magnitudes`, abs(x); None if that would not be faster."""
    value = fake(x)
    if value is None or value.dim() < 2:
        return None
    features = value.shape[-1]
    if not isinstance(features, int) or features < _MIN_FEATURES:
        return None
    if (traced_size(value.numel()) or 0) < features * _MIN_ROWS:
        return None
    return _call(aten.amax.default, magnitudes, [-1])


def run(graph: fx.Graph) -> None:
    """Splits each amax of a whole tensor's magnitudes that is faster by rows, in place."""
    for node in graph.find_nodes(op="call_function", target=aten.amax.default):
        magnitudes = amax_of_tensor(node)
        if magnitudes is None:
            continue
        x = magnitudes.args[0]
        assert isinstance(x, fx.Node)
        source = behind_views(x)
        with graph.inserting_before(node):
            rows = _of_input(source) if source.op == "placeholder" else _of_computed(x, magnitudes)
        if rows is not None:
            node.args = (rows,)
            if not magnitudes.users:
                graph.erase_node(magnitudes)
