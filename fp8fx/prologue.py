"""What a graph reads of FP8 weights: read in each call, in Python, in front of the compiled graph.

    f(x, W)                                             -> f(x, W.qdata, W.scale), compiled
        matmul_fp8(x, t(W.qdata), b_scale=W.scale)             matmul_fp8(x, t(qdata), b_scale=scale)

So the compiled graph has plain tensors as inputs: AOTAutograd takes nothing apart in each call, and a weight that was
moved, loaded or written to since is read as it is now.
"""

from __future__ import annotations

import operator
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from fp8fx.graph.values import attribute, value
from fp8fx.ops.fp8_tensor import FP8Tensor
from fp8fx.torch_internals import (
    AttrSource,
    CompiledCallable,
    ConstantSource,
    SerializableCallable,
    declare_static,
    disable_current_modes,
    set_source,
    source_of,
)
from fp8fx.weights.side_by_side import side_by_side
from fp8fx.weights.store import Lookup

__all__ = ["Prologue", "Prologued", "split"]


@dataclass(frozen=True)
class _Value:
    """An argument of a call, or what a step gives, by its place."""

    place: int


@dataclass(frozen=True)
class Prologue:
    """What is done in front of a compiled graph.

    Attributes:
        arguments: how many the call has.
        steps: what is called, each with its arguments; those that are values come from the call or an earlier step.
        results: what the compiled graph is called with.
    """

    arguments: int
    steps: tuple[tuple[Callable[..., Any], tuple[Any, ...]], ...]
    results: tuple[_Value, ...]

    @classmethod
    def of(cls, inputs: Sequence[fx.Node], steps: Sequence[fx.Node], results: Sequence[fx.Node]) -> Prologue:
        """That of nodes which read weights, of a graph with these inputs."""
        values: dict[fx.Node, Any] = {node: _Value(place) for place, node in enumerate((*inputs, *steps))}
        calls = ((_called(node), fx.map_arg(node.args, values.__getitem__)) for node in steps)
        return cls(len(inputs), tuple(calls), tuple(values[node] for node in results))

    def function(self) -> Callable[..., tuple[Any, ...]]:
        """The same as Python code."""
        graph = fx.Graph()
        nodes = [graph.placeholder(f"argument_{i}") for i in range(self.arguments)]
        for target, args in self.steps:
            given = tuple(nodes[x.place] if isinstance(x, _Value) else x for x in args)
            nodes.append(graph.call_function(target, given))
        graph.output(tuple(nodes[x.place] for x in self.results))
        return fx.GraphModule({}, graph).forward


def _called(node: fx.Node) -> Callable[..., Any]:
    if node.op == "call_module":
        lookup: Lookup = attribute(_owner(node), str(node.target))
        return lookup.forward  # without the hooks of a module's call
    assert callable(node.target)
    return node.target


def _owner(node: fx.Node) -> fx.GraphModule:
    owner = node.graph.owning_module
    assert owner is not None
    return owner


def _early(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that read weights."""
    early: set[fx.Node] = set()
    for node in graph.nodes:
        are_known = all(source.op == "placeholder" or source in early for source in node.all_input_nodes)
        if are_known and _reads(node, early):
            early.add(node)
    return [node for node in graph.nodes if node in early]


def _reads(node: fx.Node, early: set[fx.Node]) -> bool:
    """Whether the node reads a weight, or one of what another such node gives."""
    if node.op == "call_module":
        return isinstance(attribute(_owner(node), str(node.target)), Lookup)
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return isinstance(value(node.all_input_nodes[0]), FP8Tensor) and node.args[1] in ("qdata", "scale")
    return node.target is side_by_side or (node.target is operator.getitem and node.args[0] in early)


def _become_input(node: fx.Node, last: fx.Node) -> fx.Node:
    """The input that takes the place of a node, behind the `last` one."""
    graph = node.graph
    with graph.inserting_after(last):
        new = graph.placeholder(node.name)
    root = node
    while root.op != "placeholder":
        root = root.all_input_nodes[0]
    new.meta = {key: x for key, x in node.meta.items() if key == "example_value"}
    # A weight of the model keeps its address from call to call: a CUDA graph need not copy it.
    new.meta["tensor_dict"] = {**root.meta.get("tensor_dict", {})}
    source = source_of(root)
    if source is not None:
        is_attribute = node.target is getattr
        set_source(new, AttrSource(source, str(node.args[1])) if is_attribute else ConstantSource(f"fp8fx.{node.name}"))
    node.replace_all_uses_with(new)
    return new


class Prologued(SerializableCallable):
    """A compiled graph behind its prologue.

    Args:
        prologue: gives of the arguments of a call what the graph is called with.
        compiled: the compiled graph.
    """

    def __init__(self, prologue: Prologue, compiled: Callable[..., Any]) -> None:
        self.prologue = prologue
        self.compiled = compiled
        self._read = prologue.function()

    def __call__(self, *args: Any) -> Any:
        """What the graph gives of a call's arguments."""
        return self.compiled(*self._read(*args))

    @classmethod
    def serialize_compile_artifacts(cls, fn: Prologued) -> bytes:
        """What torch saves of it, for `deserialize_compile_artifacts`."""
        compiled = CompiledCallable.serialize_compile_artifacts(CompiledCallable(fn.compiled))
        return pickle.dumps((fn.prologue, compiled))

    @classmethod
    def deserialize_compile_artifacts(cls, data: bytes) -> Prologued:
        """The callable once more."""
        prologue, compiled = pickle.loads(data)
        return cls(prologue, CompiledCallable.deserialize_compile_artifacts(compiled))


def split(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> tuple[Sequence[Any], Prologue | None]:
    """Takes what reads FP8 weights out of the graph.

    Args:
        gm: the rewritten graph, which becomes one of plain tensors, in place.
        example_inputs: what it is called with.

    Returns:
        What the new graph is called with, and what gives that of the arguments of a call; None if there is nothing to
        read.
    """
    graph = gm.graph
    early = _early(graph)
    if not early:
        return example_inputs, None
    placeholders = graph.find_nodes(op="placeholder")
    read = [node for node in early if any(user not in early for user in node.users)]
    weights = {source for node in early for source in node.all_input_nodes if source.op == "placeholder"}
    unread = [node for node in weights if all(user in early for user in node.users)]
    kept = [node for node in placeholders if node not in unread]
    prologue = Prologue.of(placeholders, early, (*kept, *read))
    last = placeholders[-1]
    for node in read:
        last = _become_input(node, last)
    for node in reversed(early):
        graph.erase_node(node)
        if node.op == "call_module":
            gm.delete_submodule(str(node.target))
    for node in unread:
        graph.erase_node(node)
    gm.recompile()
    with disable_current_modes():
        inputs = prologue.function()(*example_inputs)
    for node, x in zip(read, inputs[len(kept) :], strict=True):
        if isinstance(x, Tensor):
            declare_static(x, f"fp8fx.{node.name}")
    return inputs, prologue
