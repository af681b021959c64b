"""What a graph changes in place, and which of its nodes share memory.

An operator's schema tells it. If a target leads to none, its name and arguments do. Code that is not seen here may
change whatever it gets: a function of the user's own, the body of a higher-order operator, a module that is not
torch's.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

from torch import Tensor, fx, nn

from fp8fx.graph.hooks import has_hooks
from fp8fx.graph.operators import called, is_known, is_operator, overloads
from fp8fx.graph.values import attribute, fake, storage
from fp8fx.torch_internals import HigherOrderOperator, OpOverload, pytree, schema_of

__all__ = ["Writes"]

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
"""Python's operators that change their first operand, without underscores."""


_UNMARKED = {
    "__getitem__",
    "_unsafe_view",
    "alpha_dropout",
    "atleast_1d",
    "atleast_2d",
    "atleast_3d",
    "broadcast_tensors",
    "cartesian_prod",
    "conj_physical",
    "dropout",
    "einsum",
    "feature_alpha_dropout",
    "feature_dropout",
    "meshgrid",
    "sum_to_size",
    "type_as",
}
"""What may give an argument back, or a view of it, though no schema says so."""


_Places = Set[int | str]
"""Arguments, by position and by name."""


_FIRST: _Places = {0, "input"}


@functools.cache
def _memory(target: Any) -> tuple[_Places, _Places | None]:
    """The arguments that a call may change, and those whose memory its result may be; None for any of them."""
    name = target if isinstance(target, str) else getattr(target, "_opname", getattr(target, "__name__", ""))
    is_sort = name == "sort" and not isinstance(target, OpOverload)  # also TorchScript's, of lists and in place
    schemas = [] if is_sort else [schema_of(overload) for overload in overloads(target)]
    changed: set[int | str] = set()
    returned: set[int | str] = set()
    for schema in schemas:
        for position, argument in enumerate(schema.arguments):
            if argument.alias_info is None:
                continue
            places: set[int | str] = {argument.name}
            if not argument.kwarg_only:
                places |= {position} if position else _FIRST
            returned |= places
            if argument.alias_info.is_write:
                changed |= places
    is_python_operator = getattr(target, "__module__", "") == "_operator"  # `and_`, for `and` is a keyword
    is_marked = name.endswith("_") and not name.endswith("__") and not is_python_operator
    if name.strip("_") in _IN_PLACE or (not schemas and is_marked):
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
    return all(type(m).__module__.startswith("torch.nn.modules.") and not has_hooks(m) for m in module.modules())


def _module_effects(node: fx.Node, module: nn.Module) -> tuple[Sequence[fx.Node], Sequence[fx.Node]]:
    """See `_effects`."""
    operands = node.all_input_nodes
    changes = not _are_known(module) or any(getattr(part, "inplace", False) for part in module.modules())
    is_fresh = not changes and isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return operands if changes else [], [] if is_fresh else operands


def _effects(node: fx.Node, gm: fx.GraphModule) -> tuple[Sequence[fx.Node], Sequence[fx.Node]]:
    """What a call may change of what it gets, and whose memory its result may be."""
    target = node.target
    operands = node.all_input_nodes
    if node.op == "call_module":
        return _module_effects(node, attribute(gm, str(target)))
    is_seen = is_operator(target) or node.op == "call_method" or is_known(target)
    if isinstance(target, HigherOrderOperator) or not is_seen:
        return operands, operands
    if called(node) == "einsum" and len(operands) > 1:  # of one operand it may be a view
        return [], []
    changed, returned = _memory(target)
    if not is_operator(target):
        # As F.relu has `inplace`, torch.add `out`, and F.embedding `max_norm`.
        given = {**dict(zip(_parameters(target), node.args, strict=False)), **node.kwargs}
        inplace, out, renorms = (given.get(name) not in (None, False) for name in ("inplace", "out", "max_norm"))
        changed = {
            *changed,
            *(_FIRST if inplace else ()),
            *(("out",) if out else ()),
            *((1, "weight") if renorms else ()),
        }
        returned = None if inplace or out else returned
    return list(_operands(node, changed)), operands if returned is None else list(_operands(node, returned))


def _own_changed(module: nn.Module) -> list[Tensor]:
    """What a module called as a whole may change of its own.

    BatchNorm may change its buffers, an embedding what it renorms, a linear nothing.
    """
    if not _are_known(module):
        return [*module.parameters(), *module.buffers()]
    renorming = (part for part in module.modules() if getattr(part, "max_norm", None) is not None)
    return [*module.buffers(), *(x for part in renorming for x in part.parameters())]


def _apart(node: fx.Node, other: fx.Node) -> bool:
    """Whether the nodes' values are known to share no memory. Those of ATen's graphs do not tell."""
    x, y = fake(node), fake(other)
    if isinstance(node.target, OpOverload) or getattr(x, "fake_mode", None) is not getattr(y, "fake_mode", None):
        return False
    a, b = storage(x), storage(y)
    return a is not None and b is not None and a != b


_Keys = frozenset[Any]


def _keys(x: Tensor) -> _Keys:
    memory = storage(x)
    return _Keys({id(x) if memory is None else memory})


class Writes:
    """What a graph changes in place.

    Memory goes by the node that makes it. That of a parameter, a buffer or a constant goes by its storage, if that is
    known.

    Args:
        gm: the graph's module.
        constants: the nodes that hold a parameter, a buffer or a constant.
        tensors: the tensors behind nodes that read an attribute or are an input.
    """

    def __init__(self, gm: fx.GraphModule, constants: Set[fx.Node], tensors: Mapping[fx.Node, Tensor]) -> None:
        self._memory: dict[fx.Node, _Keys] = {}
        self._all: list[tuple[fx.Node, _Keys]] = []
        self._first: dict[Any, fx.Node] = {}
        for node in gm.graph.nodes:
            if not node.op.startswith("call_"):
                keys = _keys(tensors[node]) if node in tensors else _Keys()
                # An input may be a view of a weight, too.
                self._memory[node] = keys if keys and node in constants else keys | {node}
                continue
            changed, returned = _effects(node, gm)
            shared = _Keys().union(*(self._memory[x] for x in returned if not _apart(node, x)))
            self._memory[node] = shared or _Keys({node})
            own = _own_changed(attribute(gm, node.target)) if node.op == "call_module" else ()
            self._change(node, [*(self._memory[x] for x in changed), *map(_keys, own)])

    def _change(self, node: fx.Node, memory: Iterable[_Keys]) -> None:
        keys = _Keys().union(*memory)
        if keys:
            self._all.append((node, keys))
        for key in keys:
            self._first.setdefault(key, node)

    def first(self, of: fx.Node | Tensor) -> fx.Node | None:
        """The first node that may change a node's value, or a parameter or buffer; None if none does."""
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

    def share_memory(self, node: fx.Node, others: Iterable[fx.Node]) -> bool:
        """Whether a node's value may have memory that one of the others has."""
        return not self._memory[node].isdisjoint(_Keys().union(*(self._memory[other] for other in others)))

    def count(self, of: fx.Node, before: fx.Node) -> int:
        """How many nodes `before` that one may change the memory of a node's value.

        Inputs of the graph may be views of one another.
        """

        def has_input(keys: _Keys) -> bool:
            return any(isinstance(key, fx.Node) and key.op == "placeholder" for key in keys)

        own = self._memory[of]
        return sum(
            bool(keys & own) or (has_input(keys) and has_input(own)) for node, keys in self._all if node < before
        )
