"""unwrap: an FP8 weight of the model -> its data and its scale, read from the weight when the graph is called.

    matmul_fp8(x, t(W), ...)              -> matmul_fp8(x, t(W.qdata), ..., b_scale=W.scale)
    grouped_mm_fp8(x, transpose(W), offs) -> grouped_mm_fp8(x, transpose(W.qdata), offs, b_scale=W.scale)
    matmul_fp8(x, cat([t(V), t(W)]), ...) -> VW = side_by_side(V, W)
                                             matmul_fp8(x, t(VW.qdata), ..., b_scale=VW.scale)
    anything(W)                           -> anything(to(mul(to(W.qdata, float32), W.scale), W.dtype))

The backend reads them in front of the compiled graph, which then has plain tensors as inputs.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fp8fx.graph.bodies import has_flat_inputs
from fp8fx.graph.values import value
from fp8fx.linears.weight_operand import first_argument
from fp8fx.ops import grouped_mm as grouped
from fp8fx.ops import matmul
from fp8fx.ops.fp8_weight import FP8Weight
from fp8fx.pipeline import Rewrite
from fp8fx.recipes.recipe import RECIPES
from fp8fx.torch_internals import HigherOrderOperator
from fp8fx.weights.side_by_side import side_by_side

__all__ = ["CHANGES", "NEEDS", "run"]

NEEDS: tuple[str, ...] = ("writes",)
CHANGES = True

aten = torch.ops.aten

_GROUPED = {grouped.op(recipe) for recipe in RECIPES}
_OPS = _GROUPED | {matmul.op(recipe) for recipe in RECIPES}


def _with_value(node: fx.Node, result: Any) -> fx.Node:
    node.meta["example_value"] = result
    return node


class _Unwrapper:
    """The parts of one graph's FP8 weights."""

    def __init__(self, graph: fx.Graph, weights: dict[fx.Node, FP8Weight]) -> None:
        self.graph = graph
        self.weights = weights
        self.parts: dict[tuple[object, ...], fx.Node] = {}
        self.last = list(graph.find_nodes(op="placeholder"))[-1]  # behind which what reads the weights stands

    def part(self, weight: fx.Node, name: str) -> fx.Node:
        """The node of a weight's `qdata` or `scale`."""
        return self._read(getattr, (weight, name), getattr(self.weights[weight], name))

    def row(self, weights: tuple[fx.Node, ...], name: str) -> fx.Node:
        """The node of the `qdata` or `scale` of these weights side by side."""
        parts: list[Tensor] = [getattr(self.weights[weight], name) for weight in weights]
        like_all = parts[0].new_empty((sum(map(len, parts)), *parts[0].shape[1:]))
        return self._read(side_by_side, (name, *weights), like_all)

    def _read(self, target: Any, args: tuple[object, ...], result: Tensor) -> fx.Node:
        key = target, *args
        if key not in self.parts:
            with self.graph.inserting_after(self.last):
                node = self.graph.call_function(target, args)  # type: ignore[arg-type]
            self.last = self.parts[key] = _with_value(node, result)
        return self.parts[key]

    def seen(self, node: fx.Node, steps: Sequence[fx.Node], root: fx.Node) -> fx.Node:
        """`node` in the place of `root`, seen by the same steps."""
        copies = {root: node}
        for step in steps:
            copies[step] = self.graph.node_copy(step, copies.__getitem__)
            copies[step].meta = {}
        return copies[steps[-1]] if steps else node

    def _siblings(self, node: fx.Node) -> tuple[fx.Node, ...] | None:
        """The weights (N, K) that `merge` put side by side; None if `node` is something else."""
        if node.target is not aten.cat.default:
            return None
        parts: Any = node.args[0]
        paths = [_path(part, self.weights) for part in parts]
        roots = tuple(path[0] for path in paths if path is not None)
        return roots if len(roots) == len(parts) else None

    def _operand_of(self, op: fx.Node, weights: tuple[fx.Node, ...]) -> tuple[fx.Node, fx.Node]:
        """The data and the scale of weights side by side."""
        data = self.row(weights, "qdata")
        sizes = [self.weights[weight].shape[0] for weight in weights]
        has_scale_a_row = all(len(self.weights[weight].scale) == n for weight, n in zip(weights, sizes, strict=True))
        with self.graph.inserting_before(op):
            transposed = self.graph.call_function(aten.t.default, (data,))
            if has_scale_a_row:
                return transposed, self.row(weights, "scale")
            scales = [self.part(weight, "scale") for weight in weights]
            scales = [self.graph.call_method("expand", (x, n, 1)) for x, n in zip(scales, sizes, strict=True)]
            return transposed, self.graph.call_function(aten.cat.default, (scales,))

    def operand(self, op: fx.Node, *, is_grouped: bool, may_be_merged: bool) -> tuple[fx.Node, fx.Node] | None:
        """The data and the scale that `op` reads of FP8 weights; None if it reads none of these as an operand."""
        weight = op.args[1]
        assert isinstance(weight, fx.Node)
        if may_be_merged and (weights := self._siblings(weight)) is not None:
            return self._operand_of(op, weights)
        seen: Any = value(weight)
        path = _path(weight, self.weights)
        if path is None or not isinstance(seen, FP8Weight) or not seen.contracts_k:
            return None
        root, steps = path
        qdata, scale = self.part(root, "qdata"), self.part(root, "scale")
        with self.graph.inserting_before(op):
            data = self.seen(qdata, steps, root)
            scale = self.seen(self.graph.call_method("expand", (scale, tuple(self.weights[root].shape))), steps, root)
            scale = self.graph.call_function(aten.select.int, (scale, -2, 0))
            if is_grouped:
                return data, scale
            if seen.scale.shape[-1] == 1 != seen.shape[-1]:
                return data, self.graph.call_function(aten.select.int, (scale, -1, 0))
            return data, self.graph.call_function(aten.unsqueeze.default, (scale, -1))

    def read_once(self) -> None:
        """Reads a weight that lies beside others, and is also read alone, as a part of these.

        The weight itself is another tensor, which moves in memory when they are laid side by side.
        """
        rows = [key for key in self.parts if key[0] is side_by_side]
        for key in rows:
            _, name, *weights = key
            start = 0
            for weight in weights:
                assert isinstance(weight, fx.Node)
                size = self.weights[weight].shape[0]
                alone = self.parts.pop((getattr, weight, name), None)
                if alone is not None:
                    with self.graph.inserting_after(self.last):
                        part = self.graph.call_method("narrow", (self.parts[key], 0, start, size))
                    self.last = _with_value(part, value(alone))
                    alone.replace_all_uses_with(part)
                    self.graph.erase_node(alone)
                start += size

    def dequantize(self, weight: fx.Node) -> None:
        """Gives what still reads the weight itself its values in high precision, apart from bodies to come."""
        parts = set(self.parts.values())
        readers = [node for node in weight.users if node not in parts and not has_flat_inputs(node)]
        if not readers:
            return
        qdata, scale = self.part(weight, "qdata"), self.part(weight, "scale")
        x = self.weights[weight]
        with self.graph.inserting_after(self.last):
            exact = _with_value(self.graph.call_method("to", (qdata, torch.float32)), x.qdata.float())
        with self.graph.inserting_after(exact):
            product = _with_value(self.graph.call_function(operator.mul, (exact, scale)), x.qdata.float() * x.scale)
        with self.graph.inserting_after(product):
            result = _with_value(self.graph.call_method("to", (product, x.dtype)), x.dequantize())
        for node in readers:
            node.replace_input_with(weight, result)


def _path(node: fx.Node, weights: dict[fx.Node, FP8Weight]) -> tuple[fx.Node, list[fx.Node]] | None:
    """The weight that `node` is a view of, and the steps from there; None if it is none of one alone."""
    steps: list[fx.Node] = []
    while node not in weights:
        source = first_argument(node)
        if not isinstance(source, fx.Node) or node.all_input_nodes != [source]:
            return None
        steps.insert(0, node)
        node = source
    return node, steps


def _erase_unread(node: fx.Node) -> None:
    """Erases what an op has read of weights, if nothing else does. (fx's own elimination also erases `x.add_(y)`.)"""
    if node.users or node.op == "placeholder":
        return
    sources = node.all_input_nodes
    node.graph.erase_node(node)
    for source in sources:
        _erase_unread(source)


def run(rewrite: Rewrite) -> int:
    """Unwraps every FP8 weight that is an input of the graph; returns how many."""
    graph = rewrite.gm.graph
    values = {node: value(node) for node in graph.find_nodes(op="placeholder")}
    weights = {node: x for node, x in values.items() if isinstance(x, FP8Weight)}
    if not weights:
        return 0
    # One that the graph writes is left to AOTAutograd, which takes it apart and puts it together again.
    # (A higher-order operator writes to none of its inputs, though it cannot be seen here.)
    writes = rewrite.facts.writes
    writers = {node for node in writes.writers if not isinstance(node.target, HigherOrderOperator)}
    written = writes.changed_by(writers)
    weights = {node: x for node, x in weights.items() if node not in written}
    count = len(weights)
    unwrapper = _Unwrapper(graph, weights)
    rewritten = set(rewrite.ops.values())
    single_rows = {rewrite.ops[node] for node, choice in rewrite.choices.items() if choice.weight_only}
    # Those of a graph that was converted before are among them.
    for op in [node for node in graph.nodes if node.target in _OPS and "b_scale" not in node.kwargs]:
        operand = unwrapper.operand(op, is_grouped=op.target in _GROUPED, may_be_merged=op in rewritten)
        if operand is not None:
            before: Any = op.args[1]
            op.update_arg(1, operand[0])
            _erase_unread(before)
            op.update_kwarg("b_scale", operand[1])
            if op in single_rows:
                op.update_kwarg("weight_only", True)
    for weight in list(unwrapper.weights):
        unwrapper.dequantize(weight)
    unwrapper.read_once()
    return count
