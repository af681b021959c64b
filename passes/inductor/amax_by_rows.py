"""amax_by_rows: the amax of a large tensor is found by long rows first, on Inductor's final graph.

    amax(abs(t(w)))    ->    amax(amax(abs(view(w, [n, 16384])), [1]))    w lies in memory, as a weight does
    amax(abs(f(x)))    ->    amax(amax(abs(f(x)), [-1]))                  f(x) has 8192 features or more

A reduction of a whole tensor Inductor splits itself, into pieces: it reads weights at 2.4 TB/s on an H100, by long rows at 2.8. What is
computed with fewer features is left to it: by such rows it took longer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fp8fx.graph.values import fake, traced_size

__all__ = ["run"]

aten = torch.ops.aten


_ROW = 16384  # values of a tensor in memory, however long its own rows are


_LONG = 8192  # values of a row that is computed


_ROWS = 512  # at least, that there is work for the whole device


_VIEWS = (aten.permute.default, aten.t.default, aten.view.default, aten.reshape.default)


def _call(target: Any, x: fx.Node, *args: Any) -> fx.Node:
    node = x.graph.call_function(target, (x, *args))
    node.meta = {**x.meta, "val": target(x.meta["val"], *args), "original_aten": target}  # which names the kernel
    return node


def _stored(node: fx.Node) -> fx.Node | None:
    """The graph's input that `node` is a view of all of."""
    while node.target in _VIEWS:
        node = node.args[0]  # type: ignore[assignment]
    return node if node.op == "placeholder" else None


def _by_rows(magnitudes: fx.Node) -> fx.Node | None:
    """The amax of each row of `magnitudes`, or of all that is in them, seen as rows; None where that would not be faster."""
    x = magnitudes.args[0]
    assert isinstance(x, fx.Node)
    source = _stored(x)
    known = fake(x if source is None else source)
    if known is None or known.dim() < 2:
        return None
    if source is not None:
        size = known.numel()
        if not isinstance(size, int) or size % _ROW or size < _ROW * _ROWS or not known.is_contiguous():
            return None
        rows = _call(aten.view.default, source, [size // _ROW, _ROW])
        return _call(aten.amax.default, _call(aten.abs.default, rows), [1])
    features = known.shape[-1]
    if not isinstance(features, int) or features < _LONG or (traced_size(known.numel()) or 0) < features * _ROWS:
        return None
    return _call(aten.amax.default, magnitudes, [-1])


def run(graph: fx.Graph) -> None:
    """Splits each amax of a whole tensor's magnitudes that is faster by rows, in place."""
    for node in graph.find_nodes(op="call_function", target=aten.amax.default):
        magnitudes = node.args[0]
        if len(node.args) > 1 or node.kwargs or magnitudes.target is not aten.abs.default:
            continue
        with graph.inserting_before(node):
            rows = _by_rows(magnitudes)
        if rows is not None:
            node.args = (rows,)
            if not magnitudes.users:
                graph.erase_node(magnitudes)
