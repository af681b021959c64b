"""freeze: the weight of an FP8 op -> an FP8 weight, quantized now; for inference, if the user asks for it.

    matmul_fp8(x, t(W), ...)              -> matmul_fp8(x, t(W), ...), W an FP8Weight under its own name
    matmul_fp8(x, cat([t(V), t(W)]), ...) -> matmul_fp8(x, t(V_frozen), ...), one FP8Weight of both
    grouped_mm_fp8(x, W, offs)            -> grouped_mm_fp8(x, W, offs), W an FP8Weight

So it is if the graph holds the weight itself. A weight that something else reads stays as it is, and the op reads an
FP8Weight of another name; so it is also if the op reads a part of a weight, or what is computed of weights.

A weight that is an input, such as Dynamo's parameters, stays where it is. What it is frozen to is looked up in each
call, and made anew if the weight has changed since.

    matmul_fp8(x, t(W), ...)              -> W_fp8, W_scale = frozen(W)
                                             matmul_fp8(x, t(W_fp8), ..., b_scale=W_scale)
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fp8fx.errors import ExecutorError, FreezeError
from fp8fx.executors.registry import names_that_keep_fp8_weights, resolve
from fp8fx.graph.constants import expression
from fp8fx.graph.facts import Facts
from fp8fx.graph.names import name_of
from fp8fx.graph.values import fake, unused
from fp8fx.linears.weight_operand import is_called_view
from fp8fx.ops import grouped_mm as grouped
from fp8fx.pipeline import Rewrite
from fp8fx.reasons import Because, Remark
from fp8fx.recipes.recipe import RECIPES, Gemm
from fp8fx.torch_internals import source_of
from fp8fx.weights.converted_weights import Operand, place_weights
from fp8fx.weights.frozen_tensor import Frozen
from fp8fx.weights.store import Lookup, Store

__all__ = ["CHANGES", "NEEDS", "run"]

NEEDS: tuple[str, ...] = ("constants", "computed", "tensors", "writes")
CHANGES = True


aten = torch.ops.aten

_GROUPED = {grouped.op(recipe) for recipe in RECIPES}


def _build(
    sources: Sequence[fx.Node], steps: Sequence[fx.Node], result: fx.Node, dtype: torch.dtype | None
) -> fx.GraphModule:
    """The nodes from `sources` to `result` as a graph of their own, cast to `dtype` as autocast would."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {node: graph.placeholder(f"source_{i}") for i, node in enumerate(sources)}
    for i, node in enumerate(steps):  # under names that do not depend on the graph: equal expressions have equal code
        args, kwargs = fx.map_arg((node.args, node.kwargs), copies.__getitem__)
        copies[node] = graph.create_node(node.op, node.target, args, kwargs, f"step_{i}")
    output = copies[result]
    graph.output(output if dtype is None else graph.call_method("to", (output, dtype)))
    return fx.GraphModule({}, graph)


def _is_of_dynamo(node: fx.Node) -> bool:
    """Whether the call that Dynamo makes gives the node its tensor."""
    return node.op == "placeholder" and source_of(node) is not None


def _read(op: fx.Node, data: fx.Node, scale: fx.Node | None = None, *, is_transposed: bool = False) -> None:
    """Lets an op read this weight, (N, K) or of several experts (E, N, K), unless it is transposed."""
    if not is_transposed:
        with op.graph.inserting_before(op):
            if op.target in _GROUPED:
                data = op.graph.call_function(aten.transpose.int, (data, 1, 2))
            else:
                data = op.graph.call_function(aten.t.default, (data,))
    op.update_arg(1, data)
    if scale is not None:
        op.update_kwarg("b_scale", scale)


class _Freezer:
    """Freezes the operands of one graph's ops, and then lets the graph forget their originals."""

    def __init__(self, facts: Facts, store: Store, recipe: str) -> None:
        self.gm = facts.gm
        self.store = store
        self.recipe = recipe
        self.constants = facts.constants
        self.computed = facts.computed
        self.tensors = facts.tensors
        self.writes = facts.writes
        self.frozen_steps: set[fx.Node] = set()  # from the sources to what is frozen
        self.operands: list[tuple[fx.Node, Operand]] = []  # of tensors that the graph holds itself, by their ops
        self.lookups: dict[Any, list[fx.Node]] = {}  # of the graph's inputs, by `Operand.key`
        self.last = self._behind_what_is_read()

    def _behind_what_is_read(self) -> fx.Node:
        """The node behind which what the graph's inputs are frozen to is read."""
        nodes: list[fx.Node] = list(self.gm.graph.nodes)
        return next((node for node in reversed(nodes) if node.op == "placeholder"), nodes[0])

    def freeze(self, op: fx.Node, operand: fx.Node, gemm: Gemm | None) -> Because | None:
        """Freezes what an op reads: its weight, or its bias if there is no `gemm`. Returns why it cannot be.

        Raises:
            FreezeError: a weight requires grad in grad mode.
        """
        origin = expression(operand, self.constants)
        if origin is None:
            return Remark.VALUE_UNKNOWN()
        sources, steps = origin
        if not self.writes.leave((*sources, *steps)):
            return Remark.WRITTEN()
        tensors = [x for node in sources if (x := self.tensors.get(node)) is not None]
        are_inputs = [node.op == "placeholder" for node in sources]
        if len(tensors) < len(sources) or (any(are_inputs) and not all(map(_is_of_dynamo, sources))):
            return Remark.VALUE_UNKNOWN()
        names = tuple(map(name_of, sources))
        trained = [name for name, x in zip(names, tensors, strict=True) if x.requires_grad]
        if trained and torch.is_grad_enabled():
            raise FreezeError(
                f"freeze=True, and {trained[0]} requires grad in grad mode; freezing is for inference: "
                "use torch.no_grad() around the call, or model.requires_grad_(False)"
            )
        result = fake(op)
        dtype = result.dtype if result is not None and result.dtype != tensors[0].dtype else None
        frozen = Frozen(names, _build(sources, steps, operand, dtype), gemm)
        self.frozen_steps.update(steps)
        if not any(are_inputs):
            self.operands.append((op, Operand(frozen, tensors)))
        elif gemm is None:
            op.update_kwarg("bias", self._looked_up(op, frozen, sources, tensors)[0])
        else:
            _read(op, *self._looked_up(op, frozen, sources, tensors))
        return None

    def _looked_up(
        self, op: fx.Node, frozen: Frozen, sources: Sequence[fx.Node], tensors: Sequence[Tensor]
    ) -> list[fx.Node]:
        """New nodes that read what is frozen of the graph's inputs, as these are in each call."""
        key = Operand(frozen, tensors).key
        if key not in self.lookups:
            self.store.forget(tensors)
            name = unused(self.gm, "frozen")
            self.gm.add_submodule(name, Lookup(frozen, self.store))
            graph = self.gm.graph
            with graph.inserting_after(self.last):
                entry = self.last = graph.call_module(name, tuple(sources))
            self.lookups[key] = []
            for i in range(2 if frozen.gemm else 1):
                with graph.inserting_after(self.last):
                    self.last = graph.call_function(operator.getitem, (entry, i))
                self.last.meta = _provenance(op)
                self.lookups[key].append(self.last)
        return self.lookups[key]

    def finish(self) -> None:
        """Lets the ops read FP8 weights of the module in the place of its own tensors, which it forgets."""
        for op, operand in self.operands:
            if operand.frozen.gemm is None:
                op.update_kwarg("bias", None)
            else:
                op.update_arg(1, op.args[0])  # for now: its weight has no reader
        self._erase_unread()
        places = place_weights(self.gm, [operand for _, operand in self.operands], self.recipe)
        for op, operand in self.operands:
            name, is_transposed = places[operand.key]
            with self.gm.graph.inserting_before(op):
                node = self.gm.graph.get_attr(name)
            node.meta = _provenance(op)
            if operand.frozen.gemm is None:
                op.update_kwarg("bias", node)
            else:
                _read(op, node, is_transposed=is_transposed)

    def _erase_unread(self) -> None:
        graph = self.gm.graph
        for node in reversed(graph.nodes):
            is_left_over = node.op == "get_attr" or node in self.frozen_steps
            if not node.users and (is_left_over or (node in self.computed and is_called_view(node))):
                graph.erase_node(node)


def _provenance(op: fx.Node) -> dict[str, Any]:
    return {key: x for key, x in op.meta.items() if key in ("nn_module_stack", "stack_trace")}


def _check_executor(rewrite: Rewrite) -> None:
    """Raises ExecutorError if the executor keeps no FP8 weights."""
    for match in rewrite.matches:
        if match.tensor.device.type == "meta":
            continue
        executor = resolve(rewrite.config.executor, match.tensor.device)
        if not executor.keeps_fp8_weights:
            others = ", ".join(map(repr, names_that_keep_fp8_weights()))
            raise ExecutorError(
                f"freeze=True, and executor {executor.name!r} keeps no FP8 weights; use {others}, or no freeze"
            )


def run(rewrite: Rewrite) -> int:
    """Freezes every weight whose value is known and which the graph does not change; returns how many ops that touched.

    Of ops that read weights which are FP8 already, it freezes merged biases alone.

    Raises:
        ExecutorError: the executor keeps no FP8 weights.
        FreezeError: a weight requires grad in grad mode, or is not finite.
    """
    own = {rewrite.ops[match.node] for match in rewrite.matches if match.own_recipe is not None}
    are_merged = len(own) < sum(match.own_recipe is not None for match in rewrite.matches)
    if not rewrite.config.freeze and not are_merged:
        return 0
    if rewrite.config.freeze:
        _check_executor(rewrite)
    freezer = _Freezer(rewrite.facts, rewrite.store, rewrite.config.recipe)
    forward = RECIPES[rewrite.config.recipe].forward
    linears: dict[fx.Node, list[fx.Node]] = {}  # that an op computes, by the op
    for node, op in rewrite.ops.items():
        linears.setdefault(op, []).append(node)
    count = 0
    for op, nodes in linears.items():
        if op not in own:
            if not rewrite.config.freeze:
                continue
            is_exact = forward is None or op.kwargs.get("forward") is False
            reason = Remark.VALUE_UNKNOWN() if is_exact else freezer.freeze(op, _node(op.args[1]), forward)
            if reason is not None:
                for node in nodes:
                    rewrite.remark(node, reason)
                continue
            choices = [rewrite.choices[node] for node in nodes if node in rewrite.choices]
            if any(choice.weight_only for choice in choices):
                op.update_kwarg("weight_only", True)
            count += 1
        if len(nodes) > 1:
            # Otherwise merged biases would be put together in each call.
            if isinstance(op.kwargs.get("bias"), fx.Node):
                freezer.freeze(op, _node(op.kwargs["bias"]), None)
            count += op in own
    freezer.finish()
    return count


def _node(operand: object) -> fx.Node:
    assert isinstance(operand, fx.Node)
    return operand
