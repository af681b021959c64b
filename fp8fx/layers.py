"""Layers that repeat are compiled once: each becomes a call of one body.

    x = f(x, w0); x = f(x, w1)    ->    x = call(body, x, w0); x = call(body, x, w1)    where body computes f

Tracing, Inductor's passes and code generation then see one layer instead of all of them, and the compiled code is a
function that is called for each. A layer is cut behind a GEMM: what Inductor fuses in forward stays together.
"""

from __future__ import annotations

import contextlib
import hashlib
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fp8fx.graph.constants import repeats
from fp8fx.graph.copies import copy
from fp8fx.graph.facts import Facts
from fp8fx.graph.mutations import Writes
from fp8fx.graph.operators import called
from fp8fx.graph.periods import Stretch, equal_stretches
from fp8fx.graph.values import unused, value
from fp8fx.torch_internals import FakeTensor, HigherOrderOperator, pytree

__all__ = ["layers_compiled_once", "schemas_found_once"]

_INVOKE: Any = torch.ops.higher_order.invoke_subgraph

_ATTENTION = "scaled_dot_product_attention"

_GEMMS = frozenset({"linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "grouped_mm", _ATTENTION})

_LEAST_GEMMS = 4
"""A stretch with fewer is not taken for a layer, such as one of three equal projections of attention."""


def _is_fp8(node: fx.Node) -> bool:
    return str(node.target).startswith("fp8fx.")


def _is_gemm(node: fx.Node) -> bool:
    return called(node) in _GEMMS or _is_fp8(node)


def _is_plain(x: Any) -> bool:
    """Whether a value is what a body may take or give."""
    return type(x) in (int, torch.SymInt, Tensor, nn.Parameter, FakeTensor)


def _argument(node: fx.Node, place: int, names: tuple[str, ...], default: Any) -> Any:
    if len(node.args) > place:
        return node.args[place]
    return next((node.kwargs[name] for name in names if name in node.kwargs), default)


def _draws_numbers(node: fx.Node) -> bool:
    if called(node) == _ATTENTION:
        return bool(_argument(node, 4, ("dropout_p",), 0.0) != 0)
    if called(node) == "dropout":
        is_training = _argument(node, 2, ("training", "train"), True)
        return is_training is not False and bool(_argument(node, 1, ("p",), 0.5) != 0)
    return not repeats(node)


def _metadata(x: Any) -> object:
    """Equal for values that compiled code takes for equal."""
    if not isinstance(x, Tensor):
        return type(x), str(x)
    return type(x), x.dtype, x.device, str(tuple(x.shape)), str(x.stride()), x.requires_grad


def _under_autocast(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that run under autocast, which torch forgets when it traces a body's backward."""
    depth = int(torch.is_grad_enabled() and any(map(torch.is_autocast_enabled, ("cpu", "cuda"))))
    under = set[fx.Node]()
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "")
        depth += (name == "_enter_autocast") - (name == "_exit_autocast")
        if depth > 0:
            under.add(node)
    return under


def _has_transforms(graph: fx.Graph) -> bool:
    """Whether the graph runs transforms of torch.func, for which a call of a body has no rule."""
    return any("_increment_nesting" in getattr(node.target, "__name__", "") for node in graph.nodes)


class _Layers:
    """A graph and what may be said of its calls."""

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        self.gm = gm
        facts = Facts(gm, example_inputs)
        facts.shapes  # noqa: B018 - every node's value
        self.writes: Writes = facts.writes
        self.results: dict[fx.Node, fx.Node] = {}  # what became of outputs of stretches
        self.excluded = {*self.writes.writers, *facts.forward_mode, *_under_autocast(gm.graph)}

    def may_repeat(self, node: fx.Node) -> bool:
        """Whether a call is a function of its arguments alone, and known to be one."""
        if node in self.excluded or isinstance(node.target, HigherOrderOperator) or _draws_numbers(node):
            return False
        values = pytree.tree_leaves(value(node))
        return bool(values) and all(_is_plain(x) for x in values)

    def key(self, stretch: Stretch) -> object | None:
        """Equal for stretches that one body computes; None if a body cannot compute it."""
        if not any(map(_is_fp8, stretch.nodes)) or not self._may_leave(stretch):
            return None
        inputs = [value(node) for node in stretch.inputs]
        if not all(map(_is_plain, inputs)):
            return None
        return stretch.wiring(), tuple(map(_metadata, inputs))

    def _may_leave(self, stretch: Stretch) -> bool:
        """Whether the outputs are tensors, each with memory of its own."""
        taken = set(stretch.inputs)
        for node in stretch.outputs:
            if not isinstance(value(node), Tensor) or self.writes.share_memory(node, taken):
                return False
            taken.add(node)
        return True

    def groups(self, stretches: Sequence[Stretch]) -> list[list[Stretch]]:
        """Those that one body computes, if there are several."""
        groups: dict[object, list[Stretch]] = {}
        for stretch in stretches:
            if (key := self.key(stretch)) is not None:
                groups.setdefault(key, []).append(stretch)
        return [group for group in groups.values() if len(group) > 1]

    def replace_by_calls(self, stretches: Sequence[Stretch]) -> None:
        """Has each of the stretches, which are equal, call the body that the first one becomes."""
        first = Stretch.of(stretches[0].nodes)  # its inputs may have become results of calls
        body_module = _body(first)
        # AOTAutograd takes bodies of one name for the same, in all graphs that it compiles together.
        inputs = [_metadata(value(node)) for node in first.inputs]
        name = unused(self.gm, f"layer_{hashlib.sha256(repr((body_module.code, inputs)).encode()).hexdigest()[:16]}")
        setattr(self.gm, name, body_module)
        graph = self.gm.graph
        with graph.inserting_before(first.nodes[0]):
            body = graph.get_attr(name)
        for stretch in stretches:
            operands = [self.results.get(node, node) for node in stretch.inputs]
            self.results |= _call_instead(stretch, body, operands)


def _body(stretch: Stretch) -> fx.GraphModule:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in stretch.inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = {key: node.meta[key] for key in ("val", "example_value") if key in node.meta}
    for node in stretch.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in stretch.outputs))
    return fx.GraphModule({}, graph)


def _call_instead(stretch: Stretch, body: fx.Node, inputs: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Puts a call of the body in the stretch's place; returns what became of its outputs."""
    graph = body.graph
    own = set(stretch.nodes)
    results = {}
    with graph.inserting_after(stretch.nodes[-1]):
        call = graph.call_function(_INVOKE, (body, str(body.target), *inputs))
    call.meta["example_value"] = tuple(value(node) for node in stretch.outputs)
    last = call
    for place, node in enumerate(stretch.outputs):
        with graph.inserting_after(last):
            last = results[node] = graph.call_function(operator.getitem, (call, place))
        last.meta = dict(node.meta)
        node.replace_all_uses_with(last, delete_user_cb=lambda user: user not in own)
    for node in reversed(stretch.nodes):
        graph.erase_node(node)
    return results


def layers_compiled_once(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule | None:
    """A copy of the graph in which equal layers are calls of one body; None if it has no such layers.

    Args:
        gm: a rewritten graph.
        example_inputs: what it is called with.
    """
    if _has_transforms(gm.graph):
        return None
    layers = _Layers(copy(gm), example_inputs)
    calls = [node for node in layers.gm.graph.nodes if node.op.startswith("call_")]
    groups = [
        group
        for stretches in equal_stretches(calls, layers.may_repeat, _is_gemm, _LEAST_GEMMS)
        for group in layers.groups(stretches)
    ]
    for group in groups:
        layers.replace_by_calls(group)
    if not groups:
        return None
    layers.gm.graph.lint()
    layers.gm.recompile()
    return layers.gm


@contextlib.contextmanager
def schemas_found_once() -> Iterator[None]:
    """Has torch find out once for each body what it changes in place, rather than for every call.

    torch does so itself from 2.15 on. Before, it traced the body for each call, several times.
    """
    before = vars(_INVOKE).get("gen_schema")
    find: Callable[..., Any] = _INVOKE.gen_schema
    schemas: dict[object, tuple[Any, Any]] = {}

    def gen_schema(body: Any, identifier: str, *operands: Any) -> Any:
        key = id(getattr(body, "subgraph", body)), identifier, tuple(map(type, operands))
        if key not in schemas:
            schemas[key] = find(body, identifier, *operands), body  # which keeps its id
        return schemas[key][0]

    _INVOKE.gen_schema = gen_schema
    try:
        yield
    finally:
        if before is None:
            del _INVOKE.gen_schema
        else:
            _INVOKE.gen_schema = before
