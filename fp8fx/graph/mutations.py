"""What a graph changes in place, and which of its nodes share memory: by schemas, where a target leads to one, and by names and arguments.

Code that is not seen here (a function of the user's own, the body of a higher-order operator, a module that is not torch's) may change
whatever it gets.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterable, Iterator, Sequence, Set
from typing import Any

import torch
from torch import Tensor, fx, nn

from fp8fx.graph.constants import constants
from fp8fx.graph.hooks import has_hooks
from fp8fx.graph.operators import called, is_known, is_operator, overloads
from fp8fx.graph.values import attribute, fake, storage
from fp8fx.torch_internals import FakeTensor, HigherOrderOperator, OpOverload, pytree, schema_of

__all__ = ["Writes"]

aten = torch.ops.aten


_IN_PLACE = {
    "iadd",
    "iand",
    "ifloordiv",
    "ilshift",
    "imod",
    "imul",
    "ior",
    "ipow",
    "irshift",
    "isub",
    "itruediv",
    "ixor",
    "setitem",
}


# What may give an argument back, or a view of it, though no schema says so.
_UNMARKED = {
    "__getitem__",
    "_unsafe_view",
    "atleast_1d",
    "atleast_2d",
    "atleast_3d",
    "broadcast_tensors",
    "cartesian_prod",
}


_UNMARKED |= {"alpha_dropout", "dropout", "feature_alpha_dropout", "feature_dropout"}


_UNMARKED |= {"conj_physical", "einsum", "meshgrid", "sum_to_size", "type_as"}


_Places = Set[int | str]
"""Arguments, by position and by name."""


_FIRST: _Places = {0, "input"}


@functools.cache
def _memory(target: Any) -> tuple[_Places, _Places | None]:
    """The arguments that a call may change, and those whose memory its result may be; None for any of them."""
    name = target if isinstance(target, str) else getattr(target, "_opname", getattr(target, "__name__", ""))
    lists = name == "sort" and not isinstance(target, OpOverload)  # also TorchScript's, of lists and in place
    found = () if lists else overloads(target)
    schemas, changed, returned = [schema_of(one) for one in found], set[int | str](), set[int | str]()
    for schema in schemas:
        for position, argument in enumerate(schema.arguments):
            if argument.alias_info is None:
                continue
            places: _Places = (
                {argument.name} if argument.kwarg_only else {argument.name, position, *(() if position else _FIRST)}
            )
            returned |= places
            if argument.alias_info.is_write:
                changed |= places
    if name.strip("_") in _IN_PLACE or (not schemas and name.endswith("_") and not name.endswith("__")):
        return _FIRST, _FIRST
    return changed, returned if schemas and name not in _UNMARKED else None


@functools.cache
def _parameters(target: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(target).parameters) if isinstance(target, types.FunctionType) else ()


def _operands(node: fx.Node, places: Set[int | str]) -> Iterator[fx.Node]:
    """What the call is given there."""
    for place, argument in (*enumerate(node.args), *node.kwargs.items()):
        if place in places:
            yield from (leaf for leaf in pytree.tree_leaves(argument) if isinstance(leaf, fx.Node))


def _are_known(module: nn.Module) -> bool:
    """Whether a module and all in it are torch's own, and no hook does anything else."""
    return all(type(one).__module__.startswith("torch.nn.modules.") and not has_hooks(one) for one in module.modules())


def _effects(node: fx.Node, gm: fx.GraphModule) -> tuple[Sequence[fx.Node], Sequence[fx.Node]]:
    """What a call may change of what it gets, and whose memory its result may be."""
    target, every = node.target, node.all_input_nodes
    if node.op == "call_module":
        module = attribute(gm, str(target))
        changes = not _are_known(module) or any(getattr(one, "inplace", False) for one in module.modules())
        fresh = not changes and isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
        return every if changes else [], [] if fresh else every
    operator = is_operator(target)
    if isinstance(target, HigherOrderOperator) or not (operator or node.op == "call_method" or is_known(target)):
        return every, every
    if called(node) == "einsum" and len(every) > 1:  # of one operand it may be a view
        return [], []
    changed, returned = _memory(target)
    if operator:
        return list(_operands(node, changed)), every if returned is None else list(_operands(node, returned))
    given = {**dict(zip(_parameters(target), node.args, strict=False)), **node.kwargs}
    # As F.relu has it, torch.add and F.embedding.
    inplace, out, renorms = (given.get(name) not in (None, False) for name in ("inplace", "out", "max_norm"))
    changed = {*changed, *(_FIRST if inplace else ()), *(("out",) if out else ()), *((1, "weight") if renorms else ())}
    return list(_operands(node, changed)), every if returned is None or inplace or out else list(
        _operands(node, returned)
    )


def _held(module: nn.Module) -> list[Tensor]:
    """What a module called as a whole may change of its own: BatchNorm its buffers, an embedding what it renorms, a linear nothing."""
    if not _are_known(module):
        return [*module.parameters(), *module.buffers()]
    renormed = [x for one in module.modules() if getattr(one, "max_norm", None) is not None for x in one.parameters()]
    return [*module.buffers(), *renormed]


def _apart(node: fx.Node, other: fx.Node) -> bool:
    """Whether the nodes' values are known to share no memory. Those of ATen's graphs do not tell."""
    x, y = fake(node), fake(other)
    if isinstance(node.target, OpOverload) or getattr(x, "fake_mode", None) is not getattr(y, "fake_mode", None):
        return False
    a, b = storage(x), storage(y)
    return a is not None and b is not None and a != b


_Keys = frozenset[Any]


def _keys(x: Tensor) -> _Keys:
    found = storage(x)
    return _Keys({id(x) if found is None else found})


class Writes:
    """What a graph changes in place.

    Memory goes by the node that makes it; that of a parameter, a buffer or a constant by its storage, where that is known.
    """

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any] | None = None) -> None:
        self._memory: dict[fx.Node, _Keys] = {}
        self._all: list[tuple[fx.Node, _Keys]] = []
        self._first: dict[Any, fx.Node] = {}
        inputs = dict(zip(gm.graph.find_nodes(op="placeholder"), example_inputs or (), strict=False))
        held = constants(gm, example_inputs)
        for node in gm.graph.nodes:
            if not node.op.startswith("call_"):
                x = (
                    inputs.get(node)
                    if node.op == "placeholder"
                    else attribute(gm, node.target)
                    if node in held
                    else None
                )
                known = _keys(x) if isinstance(x, Tensor) and not isinstance(x, FakeTensor) else _Keys()
                self._memory[node] = (
                    known if known and node in held else known | {node}
                )  # an input may be a view of a weight, too
                continue
            changed, returned = _effects(node, gm)
            self._memory[node] = _Keys().union(*(self._memory[x] for x in returned if not _apart(node, x))) or _Keys(
                {node}
            )
            own = _held(attribute(gm, node.target)) if node.op == "call_module" else ()
            self._change(node, [*(self._memory[x] for x in changed), *map(_keys, own)])

    def _change(self, node: fx.Node, memory: Iterable[_Keys]) -> None:
        keys = _Keys().union(*memory)
        if keys:
            self._all.append((node, keys))
        for key in keys:
            self._first.setdefault(key, node)

    def first(self, of: fx.Node | Tensor) -> fx.Node | None:
        """The first node that may change the memory of a node's value, or that of a parameter or buffer; None where none does."""
        keys = self._memory.get(of, _Keys()) if isinstance(of, fx.Node) else _keys(of)
        return min((self._first[key] for key in keys if key in self._first), default=None)

    @property
    def writers(self) -> list[fx.Node]:
        """The nodes that may change memory, in the graph's order."""
        return [node for node, _ in self._all]

    def changed_by(self, writers: Set[fx.Node]) -> set[fx.Node]:
        """The nodes whose memory any of these may change."""
        changed = _Keys().union(*(keys for node, keys in self._all if node in writers))
        return {node for node, keys in self._memory.items() if keys & changed}

    def leave(self, values: Iterable[fx.Node | Tensor]) -> bool:
        """Whether the graph changes none of these."""
        return not any(self.first(x) for x in values)

    def count(self, of: fx.Node, before: fx.Node) -> int:
        """How many nodes before that one may change the memory of a node's value. Inputs of the graph may be views of one another."""

        def given(keys: _Keys) -> bool:
            return any(isinstance(key, fx.Node) and key.op == "placeholder" for key in keys)

        own = self._memory[of]
        return sum(bool(keys & own) or (given(keys) and given(own)) for node, keys in self._all if node < before)
