"""freeze: the weight of an FP8 op -> FP8 data and scale, quantized now; for inference, if the user asks for it.

    matmul_fp8(x, t(W), ...)              -> matmul_fp8(x, t(W_fp8), ..., b_scale=W_scale)
    grouped_mm_fp8(x, W, offs)            -> grouped_mm_fp8(x, transpose(W_fp8), offs, b_scale=W_scale)
    matmul_fp8(x, cat([t(V), t(W)]), ...) -> matmul_fp8(x, t(VW_fp8), ..., b_scale=VW_scale)

Of a weight that the graph held itself, the new tensors belong to the graph's module, and the original is dropped from
it. A weight that is an input, such as Dynamo's parameters, stays where it is; what it is frozen to is looked up in each
call, and made anew if the weight has changed since.

    W_fp8, W_scale = frozen(W)
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fp8fx.errors import ExecutorError, FreezeError
from fp8fx.executors.registry import names_that_keep_fp8_weights, resolve
from fp8fx.graph.constants import expression
from fp8fx.graph.copies import drop
from fp8fx.graph.facts import Facts
from fp8fx.graph.names import name_of
from fp8fx.graph.values import fake, unused
from fp8fx.linears.matches import GroupedMatch
from fp8fx.linears.weight_operand import is_called_view
from fp8fx.pipeline import Rewrite
from fp8fx.reasons import Because, Remark
from fp8fx.recipes.recipe import RECIPES, Gemm
from fp8fx.torch_internals import source_of
from fp8fx.weights.frozen_tensor import META, Account, Frozen
from fp8fx.weights.state_dicts import state_of
from fp8fx.weights.store import Lookup, Store

__all__ = ["CHANGES", "NEEDS", "run"]

NEEDS: tuple[str, ...] = ("constants", "computed", "tensors", "writes")
CHANGES = True


aten = torch.ops.aten


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


class _Freezer:
    """Freezes the operands of one graph's ops, and then lets the graph forget their originals."""

    def __init__(self, facts: Facts, store: Store) -> None:
        self.gm = facts.gm
        self.store = store
        self.constants = facts.constants
        self.computed = facts.computed
        self.tensors = facts.tensors
        self.writes = facts.writes
        self.frozen_steps: set[fx.Node] = set()  # from the sources to what is frozen
        self.frozen_here: list[Frozen] = []  # of tensors that the graph holds itself, not of its inputs
        self.originals: dict[str, Tensor] = {}  # of `frozen_here`, by name
        self.buffers: dict[Any, tuple[str, ...]] = {}  # by sources and what is made of them
        self.lookups: dict[Any, list[fx.Node]] = {}  # likewise
        self.last = self._behind_what_is_read()

    def _behind_what_is_read(self) -> fx.Node:
        """The node behind which what the graph's inputs are frozen to is read."""
        nodes: list[fx.Node] = list(self.gm.graph.nodes)
        return next((node for node in reversed(nodes) if node.op == "placeholder"), nodes[0])

    def freeze(self, op: fx.Node, operand: fx.Node, gemm: Gemm | None) -> tuple[fx.Node, ...] | Because:
        """New nodes that read what `operand` of `op` is frozen to; or why it cannot be.

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
        if any(are_inputs):
            nodes = self._looked_up(frozen, sources, tensors)
        else:
            nodes = self._held(frozen, sources, tensors, op)
        for node in nodes:
            node.meta = {key: x for key, x in op.meta.items() if key in ("nn_module_stack", "stack_trace")}
        return tuple(nodes)

    def _looked_up(self, frozen: Frozen, sources: Sequence[fx.Node], tensors: Sequence[Tensor]) -> list[fx.Node]:
        """New nodes that read what is frozen of the graph's inputs, as these are in each call."""
        key = self._key(frozen, tensors)
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
                self.lookups[key].append(self.last)
        return self.lookups[key]

    def _held(
        self, frozen: Frozen, sources: Sequence[fx.Node], tensors: Sequence[Tensor], op: fx.Node
    ) -> list[fx.Node]:
        """New nodes that read buffers, which hold what is frozen of the graph's own tensors."""
        key = self._key(frozen, tensors)
        if key not in self.buffers:
            kinds = ("fp8", "scale") if frozen.gemm else ("frozen",)
            values = frozen.make(tensors)
            names = [self._register(frozen.sources[0], kind, x) for kind, x in zip(kinds, values, strict=True)]
            self.buffers[key] = tuple(names)
            self.frozen_here.append(Frozen(frozen.sources, frozen.build, frozen.gemm, self.buffers[key]))
            self.originals |= zip(frozen.sources, tensors, strict=True)
        graph = self.gm.graph
        with graph.inserting_before(op):
            return [graph.get_attr(name) for name in self.buffers[key]]

    @staticmethod
    def _key(frozen: Frozen, tensors: Sequence[Tensor]) -> Any:
        """Equal if the same is frozen, also if a weight is written in two ways."""
        part = frozen.part([(x.shape, x.dtype) for x in tensors])
        return tuple(map(id, tensors)), frozen.build.code if part is None else part, frozen.gemm

    def _register(self, source: str, kind: str, x: Tensor) -> str:
        name = unused(self.gm, re.sub(r"\W", "_", f"{source}_{kind}"))
        if kind != "fp8":
            self.gm.register_buffer(name, x)
            return name
        # Unpickling traces the graph again, where a buffer's transpose would become a constant of its own.
        with torch.inference_mode(False):
            self.gm.register_parameter(name, nn.Parameter(x, requires_grad=False))
        return name

    def finish(self) -> None:
        """Forgets the originals that the graph held, and what it made of them."""
        graph = self.gm.graph
        for node in reversed(graph.nodes):
            is_left_over = node.op == "get_attr" or node in self.frozen_steps
            if not node.users and (is_left_over or (node in self.computed and is_called_view(node))):
                graph.erase_node(node)
        names: dict[int, tuple[str, ...]] = {}  # all that the module knows a tensor by
        for name, x in itertools.chain(
            self.gm.named_parameters(remove_duplicate=False), self.gm.named_buffers(remove_duplicate=False)
        ):
            names[id(x)] = (*names.get(id(x), ()), name)
        saved = state_of(self.gm).keys()  # what no state dict has, a refresh takes as it is
        dropped = drop(self.gm, self.originals.values())
        before = self.gm.meta.get(META, Account())
        if self.frozen_here:
            self.gm.meta[META] = Account(
                before.frozen + self.frozen_here,
                before.dropped | {name: (x.shape, x.dtype) for name, x in dropped.items() if name in saved},
                before.constants | {name: x for name, x in self.originals.items() if name not in saved},
                before.names | {name: names.get(id(x), ()) for name, x in self.originals.items()},
            )


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


def _freeze_weight(op: fx.Node, freezer: _Freezer, gemm: Gemm, *, has_experts: bool) -> Because | None:
    """Lets `op` read a frozen weight; why it does not, otherwise None."""
    weight = op.args[1]
    assert isinstance(weight, fx.Node)
    frozen = freezer.freeze(op, weight, gemm)
    if isinstance(frozen, Because):
        return frozen
    data, scale = frozen
    graph = op.graph
    with graph.inserting_before(op):
        if has_experts:
            transposed = graph.call_function(aten.transpose.int, (data, 1, 2))
        else:
            transposed = graph.call_function(aten.t.default, (data,))
    op.update_arg(1, transposed)
    op.update_kwarg("b_scale", scale)
    return None


def _freeze_bias(op: fx.Node, freezer: _Freezer) -> None:
    """Lets an op that was merged read its biases side by side, which otherwise would be put together in each call."""
    bias = op.kwargs.get("bias")
    if not isinstance(bias, fx.Node):
        return
    frozen = freezer.freeze(op, bias, None)
    if not isinstance(frozen, Because):
        op.update_kwarg("bias", frozen[0])


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
    freezer = _Freezer(rewrite.facts, rewrite.store)
    forward = RECIPES[rewrite.config.recipe].forward
    experts = {rewrite.ops[match.node] for match in rewrite.matches if isinstance(match, GroupedMatch)}
    linears: dict[fx.Node, list[fx.Node]] = {}  # that an op computes, by the op
    for node, op in rewrite.ops.items():
        linears.setdefault(op, []).append(node)
    count = 0
    for op, nodes in linears.items():
        if op not in own:
            if not rewrite.config.freeze:
                continue
            is_exact = forward is None or op.kwargs.get("forward") is False
            reason: Because | None = Remark.VALUE_UNKNOWN()
            if not is_exact:
                assert forward is not None
                reason = _freeze_weight(op, freezer, forward, has_experts=op in experts)
            if reason is not None:
                for node in nodes:
                    rewrite.remark(node, reason)
                continue
            choices = [rewrite.choices[node] for node in nodes if node in rewrite.choices]
            if any(choice.weight_only for choice in choices):
                op.update_kwarg("weight_only", True)
            count += 1
        if len(nodes) > 1:
            _freeze_bias(op, freezer)
            count += op in own
    freezer.finish()
    return count
