"""The facts of one graph: each computed when it is first read, and kept until a pass changes the graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Generic, TypeVar, overload

from torch import Tensor, fx, nn

from fp8fx.graph.bodies import in_forward_mode
from fp8fx.graph.constants import computed, constants, repeats, tensors
from fp8fx.graph.mutations import Writes
from fp8fx.graph.names import OWN
from fp8fx.graph.propagate import propagate
from fp8fx.graph.values import value

__all__ = ["Facts"]

T = TypeVar("T")


class _Fact(Generic[T]):
    """One fact, which reads as an attribute of Facts."""

    def __init__(self, compute: Callable[[Facts], T]) -> None:
        self.compute = compute
        self.name = compute.__name__
        self.__doc__ = compute.__doc__

    @overload
    def __get__(self, facts: None, owner: type[Facts]) -> _Fact[T]: ...

    @overload
    def __get__(self, facts: Facts, owner: type[Facts]) -> T: ...

    def __get__(self, facts: Facts | None, owner: type[Facts]) -> _Fact[T] | T:
        return self if facts is None else facts.read(self)


class Facts:
    """What a graph's nodes tell without being changed.

    Args:
        gm: the graph's module.
        example_inputs: the graph's inputs, if there are any; a Parameter among them is a weight.

    Raises:
        RuntimeError: a pass reads a fact that it does not declare; see `declared_by`.
    """

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any] | None = None) -> None:
        self.gm = gm
        self.example_inputs = example_inputs
        self._kept: dict[str, Any] = {}
        self._reader: str | None = None
        self._needs: Collection[str] = ()

    @classmethod
    def names(cls) -> frozenset[str]:
        """What a pass may declare that it needs."""
        return frozenset(name for name, member in vars(cls).items() if isinstance(member, _Fact))

    def read(self, fact: _Fact[T]) -> T:
        """The fact's value, computed now if it is not kept."""
        if self._reader is not None and fact.name not in self._needs:
            raise RuntimeError(f"{self._reader} reads the fact {fact.name!r}, which is not among its NEEDS")
        if fact.name not in self._kept:
            with self.declared_by(None):
                self._kept[fact.name] = fact.compute(self)
        kept: T = self._kept[fact.name]
        return kept

    @contextlib.contextmanager
    def declared_by(self, reader: str | None, needs: Collection[str] = ()) -> Iterator[None]:
        """Lets `reader` read the facts that it `needs` and no other; every fact if there is no `reader`."""
        before = self._reader, self._needs
        self._reader, self._needs = reader, needs
        try:
            yield
        finally:
            self._reader, self._needs = before

    def forget(self) -> None:
        """The graph has changed: each fact is computed anew when it is read next."""
        self._kept.clear()

    @_Fact
    def shapes(self) -> bool:
        """True, once every node has its value in its meta, as far as it follows from what is known.

        Raises:
            GraphError: the example inputs do not fit the graph.
        """
        propagate(self.gm, self.example_inputs)
        return True

    @_Fact
    def constants(self) -> set[fx.Node]:
        """The nodes that hold a parameter, a buffer or a constant tensor."""
        return constants(self.gm, self.example_inputs)

    @_Fact
    def tensors(self) -> dict[fx.Node, Tensor]:
        """The tensor itself behind a node that reads an attribute or an input, if more than a fake one is known."""
        return tensors(self.gm, self.example_inputs)

    @_Fact
    def parameters(self) -> set[fx.Node]:
        """Those of `constants` that hold a parameter."""
        real = self.tensors
        return {n for n in self.constants if any(isinstance(x, nn.Parameter) for x in (value(n), real.get(n)))}

    @_Fact
    def writes(self) -> Writes:
        """What the graph changes in place."""
        return Writes(self.gm, self.constants, self.tensors)

    @_Fact
    def states(self) -> dict[fx.Node, set[fx.Node]]:
        """The buffers and constants that the graph changes in place, by the first node that does.

        A cache of keys and values is an example.
        A parameter that a step of training updates is a weight before and after.
        """
        states: dict[fx.Node, set[fx.Node]] = {}
        writes = self.writes
        for node in self.constants - self.parameters:
            if (writer := writes.first(node)) is not None:
                states.setdefault(writer, set()).add(node)
        return states

    @_Fact
    def computed(self) -> set[fx.Node]:
        """The nodes that depend on `constants` alone."""
        return computed(self.gm, self.constants)

    @_Fact
    def computed_weights(self) -> set[fx.Node]:
        """The nodes that depend alone on `constants` which the graph does not change."""
        return computed(self.gm, self.constants.difference(*self.states.values()))

    @_Fact
    def own(self) -> set[fx.Node]:
        """The nodes that no input of the call reaches, and no random number.

        These are parameters, buffers and constants, and what is made of them alone.
        """
        reached: set[fx.Node] = set()  # in memory that is changed by what an input reaches
        while True:
            own = self._unreached(reached)
            foreign = {node for node in self.writes.writers if not own.issuperset(node.all_input_nodes)}
            changed = (own & self.writes.changed_by(foreign)) - self.parameters
            if not changed:
                return own
            reached |= changed

    def _unreached(self, reached: set[fx.Node]) -> set[fx.Node]:
        """`own`, if what writes to other memory than `reached` did not matter."""
        constants = self.constants
        own: set[fx.Node] = set()
        for node in self.gm.graph.nodes:
            is_call = node.op in ("call_function", "call_method")
            is_made_of_own = is_call and repeats(node) and own.issuperset(node.all_input_nodes)
            is_own = node in constants or node.op == "get_attr" or OWN in node.meta
            if (is_made_of_own or is_own) and node not in reached:
                own.add(node)
        return own

    @_Fact
    def forward_mode(self) -> set[fx.Node]:
        """The nodes that run where forward-mode differentiation is on, around the graph or in it."""
        return in_forward_mode(self.gm.graph)
