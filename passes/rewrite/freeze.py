"""freeze: the weight of an FP8 op -> FP8 data and scale, quantized now; for inference, where the user asks for it.

    matmul_fp8(x, t(W), ...)              -> matmul_fp8(x, t(W_fp8), ..., b_scale=W_scale)
    grouped_mm_fp8(x, W, offs)            -> grouped_mm_fp8(x, transpose(W_fp8), offs, b_scale=W_scale)
    matmul_fp8(x, cat([t(V), t(W)]), ...) -> matmul_fp8(x, t(VW_fp8), ..., b_scale=VW_scale)

The new tensors belong to the graph's module. A weight that the graph held itself is dropped from it; one that is an input, as Dynamo's
parameters are, stays where it is, and all graphs that freeze it share one copy.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fp8fx.errors import ExecutorError, FreezeError
from fp8fx.executors.registry import names_that_keep_fp8_weights, resolve
from fp8fx.graph.constants import expression, guard_identity
from fp8fx.graph.copies import drop
from fp8fx.graph.names import name_of
from fp8fx.graph.values import fake, unused
from fp8fx.linears.matches import GroupedMatch
from fp8fx.linears.weights import is_called_view
from fp8fx.pipeline import Rewrite
from fp8fx.recipes.recipe import RECIPES, Gemm
from fp8fx.weights.frozen import META, Account, Frozen
from fp8fx.weights.state import state_of
from fp8fx.weights.store import GraphHandle, nan_placeholder

__all__ = ["CHANGES", "NEEDS", "run"]

NEEDS: tuple[str, ...] = ("constants", "computed", "tensors", "writes")
CHANGES = True


aten = torch.ops.aten


_UNKNOWN = "the weight's value is not known here"


def _build(
    sources: Sequence[fx.Node], inner: Sequence[fx.Node], result: fx.Node, dtype: torch.dtype | None
) -> fx.GraphModule:
    """The nodes from `sources` to `result` as a graph of their own, cast to `dtype` as autocast would."""
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {node: graph.placeholder(f"source_{i}") for i, node in enumerate(sources)}
    for i, node in enumerate(inner):  # under names that do not depend on the graph: equal expressions have equal code
        args, kwargs = fx.map_arg((node.args, node.kwargs), new.__getitem__)
        new[node] = graph.create_node(node.op, node.target, args, kwargs, f"step_{i}")
    found = new[result]
    graph.output(found if dtype is None else graph.call_method("to", (found, dtype)))
    return fx.GraphModule({}, graph)


class _Freezer:
    def __init__(self, rewrite: Rewrite) -> None:
        self.rewrite, self.gm = rewrite, rewrite.gm
        self.store = rewrite.store
        self.constants = rewrite.facts.constants
        self.tensors = rewrite.facts.tensors
        self.computed = rewrite.facts.computed
        self.writes = rewrite.facts.writes
        self.spent: set[fx.Node] = set()
        self.frozen: list[Frozen] = []
        self.originals: dict[str, Tensor] = {}
        self.buffers: dict[Any, tuple[str, ...]] = {}  # by sources and what is made of them

    def freeze(self, op: fx.Node, operand: fx.Node, gemm: Gemm | None) -> tuple[fx.Node, ...] | str:
        """New nodes that read what `operand` of `op` is frozen to; or why it cannot be."""
        found = expression(operand, self.constants)
        if found is None:
            return _UNKNOWN
        sources, inner = found
        if not self.writes.leave((*sources, *inner)):
            return "the graph writes it"
        tensors = [self.tensors.get(node) for node in sources]
        values = [x for x in tensors if x is not None]
        if len(values) < len(tensors) or not all(map(guard_identity, sources)):
            return _UNKNOWN
        names = tuple(map(name_of, sources))
        trained = [name for name, x in zip(names, values, strict=True) if x.requires_grad]
        if trained and torch.is_grad_enabled():
            raise FreezeError(
                f"freeze=True, and {trained[0]} requires grad in grad mode; freezing is for inference: "
                "use torch.no_grad() around the call, or model.requires_grad_(False)"
            )
        result = fake(op)
        dtype = result.dtype if result is not None and result.dtype != values[0].dtype else None
        frozen = Frozen(names, _build(sources, inner, operand, dtype), gemm)
        buffers = self._buffers(frozen, sources, values)
        self.spent.update(inner)
        graph = self.gm.graph
        with graph.inserting_before(op):
            new = tuple(graph.get_attr(name) for name in buffers)
        for node in new:
            node.meta = {key: x for key, x in op.meta.items() if key in ("nn_module_stack", "stack_trace")}
        return new

    def keep_unseen(self, operand: fx.Node) -> None:
        """Keeps the parameters behind `operand` that could not be seen so again after their release, when the graph is traced once more:
        no view of what is left of them, or for several experts' weights one without strides."""
        sources, inner = expression(operand, self.constants) or ([], [])
        tensors = {node: x for node in sources if (x := self.tensors.get(node)) is not None}
        lifted = [node for node, x in tensors.items() if node.op == "placeholder" and isinstance(x, nn.Parameter)]
        if not lifted or any(tensors[node] in self.store.released for node in lifted):
            return
        try:
            left = [nan_placeholder(x, "meta") if node in lifted else x.to("meta") for node, x in tensors.items()]
            seen = Frozen((), _build(sources, inner, operand, None), None).value(left)
            if seen.dim() < 3 or 0 not in seen.stride()[-2:]:
                return
        except RuntimeError:
            pass
        for node in lifted:
            self.store.keep(name_of(node), tensors[node], GraphHandle.of(self.gm))

    def _buffers(self, frozen: Frozen, sources: Sequence[fx.Node], values: Sequence[Tensor]) -> tuple[str, ...]:
        key = self._key(frozen, values)
        if key not in self.buffers:
            lifted = all(node.op == "placeholder" for node in sources)
            made = self.store.get(frozen, values) if lifted else frozen.make(values)
            names = [
                self._register(frozen.sources[0], kind, x)
                for kind, x in zip(("fp8", "scale") if frozen.gemm else ("frozen",), made, strict=True)
            ]
            self.buffers[key] = tuple(names)
            if not lifted:
                self.frozen.append(Frozen(frozen.sources, frozen.build, frozen.gemm, self.buffers[key]))
                self.originals |= zip(frozen.sources, values, strict=True)
        return self.buffers[key]

    @staticmethod
    def _key(frozen: Frozen, values: Sequence[Tensor]) -> Any:
        """Equal where the same is frozen, if a weight is written in two ways too."""
        part = frozen.part([(x.shape, x.dtype) for x in values])
        return tuple(map(id, values)), frozen.build.code if part is None else part, frozen.gemm

    def _register(self, source: str, kind: str, x: Tensor) -> str:
        name = unused(self.gm, re.sub(r"\W", "_", f"{source}_{kind}"))
        if (
            kind == "fp8"
        ):  # unpickling traces the graph again, where a buffer's transpose would become a constant of its own
            with torch.inference_mode(False):
                self.gm.register_parameter(name, nn.Parameter(x, requires_grad=False))
        else:
            self.gm.register_buffer(name, x)
        return name

    def finish(self) -> None:
        """Forgets the originals, where the graph held them, and what it made of them."""
        graph = self.gm.graph
        for node in reversed(graph.nodes):
            if not node.users and (
                node.op == "get_attr" or node in self.spent or (node in self.computed and is_called_view(node))
            ):
                graph.erase_node(node)
        names: dict[int, tuple[str, ...]] = {}  # all that the module knows a tensor by
        for name, x in itertools.chain(
            self.gm.named_parameters(remove_duplicate=False), self.gm.named_buffers(remove_duplicate=False)
        ):
            names[id(x)] = (*names.get(id(x), ()), name)
        saved = state_of(self.gm).keys()  # what no state dict has, a refresh takes as it is
        dropped = drop(self.gm, self.originals.values())
        before = self.gm.meta.get(META, Account())
        if self.frozen:
            self.gm.meta[META] = Account(
                before.frozen + self.frozen,
                before.dropped | {name: (x.shape, x.dtype) for name, x in dropped.items() if name in saved},
                before.constants | {name: x for name, x in self.originals.items() if name not in saved},
                before.names | {name: names.get(id(x), ()) for name, x in self.originals.items()},
            )


def run(rewrite: Rewrite) -> int:
    """Freezes every weight whose value is known and which the graph does not change; returns how many ops that touched.

    Raises:
        ExecutorError: the executor keeps no FP8 weights.
        FreezeError: a weight requires grad in grad mode, is not finite, or was frozen before with another shape or dtype.
    """
    if not rewrite.config.freeze:
        return 0
    freezer, graph, count = _Freezer(rewrite), rewrite.gm.graph, 0
    recipe = RECIPES[rewrite.config.recipe]
    for match in rewrite.matches:
        if match.tensor.device.type == "meta":
            continue
        executor = resolve(rewrite.config.executor, match.tensor.device)
        if not executor.keeps_fp8_weights:
            others = ", ".join(map(repr, names_that_keep_fp8_weights()))
            raise ExecutorError(
                f"freeze=True, and executor {executor.name!r} keeps no FP8 weights; use {others}, or no freeze"
            )
    experts = {rewrite.ops[match.node] for match in rewrite.matches if isinstance(match, GroupedMatch)}
    made_of: dict[fx.Node, list[fx.Node]] = {}  # the linears that an op is, by the op
    for node, op in rewrite.ops.items():
        made_of.setdefault(op, []).append(node)
    for op, nodes in made_of.items():
        weight, bias = op.args[1], op.kwargs.get("bias")
        assert isinstance(weight, fx.Node)
        gemm = None if op.kwargs.get("forward") is False else recipe.forward
        new = _UNKNOWN if gemm is None else freezer.freeze(op, weight, gemm)
        if isinstance(new, str):
            rewrite.remark(op, f"not frozen: {new}")
            continue
        data, scale = new
        freezer.keep_unseen(weight)
        with graph.inserting_before(op):
            several = op in experts
            transposed = (
                graph.call_function(aten.transpose.int, (data, 1, 2))
                if several
                else graph.call_function(aten.t.default, (data,))
            )
        op.update_arg(1, transposed)
        op.update_kwarg("b_scale", scale)
        choices = map(rewrite.choices.get, nodes)
        if any(choice is not None and choice.weight_only for choice in choices):
            op.update_kwarg("weight_only", True)
        if isinstance(bias, fx.Node) and len(nodes) > 1:  # merged: a copy each call otherwise
            frozen = freezer.freeze(op, bias, None)
            if not isinstance(frozen, str):
                op.update_kwarg("bias", frozen[0])
        count += 1
    freezer.finish()
    return count
