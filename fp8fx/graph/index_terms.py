"""Tensors as functions of their coordinates, for what holds whatever the sizes are.

    arange(s)[None, :] <= arange(s)[:, None]    is    (i, j) -> j <= i

It knows the operators that masks are made of; of any other a table is not known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from fp8fx.graph.operators import called
from fp8fx.graph.values import value

__all__ = ["Table", "UnknownTableError", "conditions", "table_of"]

Term = Any
"""A sympy expression: an integer, or a truth value."""


class UnknownTableError(Exception):
    """An operator, or a way to call it, of which no table is known."""


@dataclass(frozen=True)
class Table:
    """A tensor.

    Attributes:
        shape: its sizes, numbers or sympy expressions.
        at: its value at coordinates, one a dimension.
    """

    shape: tuple[Any, ...]
    at: Callable[[Sequence[Term]], Term]

    def seen_in(self, coordinates: Sequence[Term]) -> Term:
        """Its value where it is broadcast: at the last coordinates, the first of a dimension that is repeated."""
        last = coordinates[len(coordinates) - len(self.shape) :]
        return self.at([0 if size == 1 else x for size, x in zip(self.shape, last, strict=True)])


def size_of(x: Any) -> Any:
    """A size, or another number of the graph, as sympy has it."""
    if isinstance(x, torch.SymInt):
        return x.node.expr
    if isinstance(x, bool) or not isinstance(x, (int, sympy.Expr)):
        raise UnknownTableError
    return x


def _pointwise(function: Callable[..., Term]) -> Callable[..., Table]:
    def table(node: fx.Node, *operands: Any) -> Table:
        def at(coordinates: Sequence[Term]) -> Term:
            return function(*(x.seen_in(coordinates) if isinstance(x, Table) else size_of(x) for x in operands))

        return Table(_shape(node), at)

    return table


def _shape(node: fx.Node) -> tuple[Any, ...]:
    """The sizes of a node's value, of integers or truth values."""
    x = value(node)
    if not isinstance(x, Tensor) or x.is_floating_point() or x.is_complex():
        raise UnknownTableError
    return tuple(size_of(size) for size in x.shape)


def _number(x: Term) -> Term:
    """A truth value as 0 or 1, if it is known."""
    if x in (sympy.true, sympy.false):
        return int(bool(x))
    if isinstance(x, sympy.core.relational.Relational | sympy.logic.boolalg.BooleanFunction):
        raise UnknownTableError
    return x


def _arange(node: fx.Node, *bounds: Any, **kwargs: Any) -> Table:
    start = size_of(bounds[0]) if len(bounds) > 1 else 0
    step = size_of(bounds[2]) if len(bounds) > 2 else 1
    return Table(_shape(node), lambda at: start + step * at[0])


def _constant(x: bool) -> Callable[..., Table]:
    def table(node: fx.Node, *sizes: Any) -> Table:
        filling = sympy.sympify(x) if _is_bool(node) else sympy.Integer(x)
        return Table(_shape(node), lambda at: filling)

    return table


def _is_bool(node: fx.Node) -> bool:
    return bool(value(node).dtype == torch.bool)


def _same(node: fx.Node, x: Table, *_: Any) -> Table:
    """A copy, perhaps of another dtype or device."""
    if _is_bool(node) and not _is_bool(node.all_input_nodes[0]):
        raise UnknownTableError
    return Table(_shape(node), x.at)


def _expand(node: fx.Node, x: Table, *_: Any) -> Table:
    return Table(_shape(node), x.seen_in)


def _unsqueeze(node: fx.Node, x: Table, dim: int) -> Table:
    dim %= len(x.shape) + 1
    return Table(_shape(node), lambda at: x.at([*at[:dim], *at[dim + 1 :]]))


def _getitem(node: fx.Node, x: Table, index: Any) -> Table:
    places = index if isinstance(index, tuple) else (index,)
    if all(isinstance(place, Table) for place in places) and len(places) == len(x.shape):
        return Table(_shape(node), lambda at: x.at([place.seen_in(at) for place in places]))
    if any(isinstance(place, Table) or place is Ellipsis for place in places):
        raise UnknownTableError

    def at(coordinates: Sequence[Term]) -> Term:
        rest = list(coordinates)
        inner: list[Term] = []
        for place in places:
            if place is None:
                rest.pop(0)
            elif isinstance(place, slice):
                if place.step not in (None, 1):
                    raise UnknownTableError
                start = 0 if place.start is None else size_of(place.start)
                inner.append(rest.pop(0) + _at_least_zero(start))
            else:
                inner.append(_at_least_zero(size_of(place)))
        return x.at([*inner, *rest])

    return Table(_shape(node), at)


def _at_least_zero(x: Term) -> Term:
    """A place from the front; those from the back depend on the size."""
    if sympy.sympify(x).is_nonnegative:
        return x
    raise UnknownTableError


def _diff(node: fx.Node, x: Table, n: int = 1, dim: int = -1, prepend: Any = None, append: Any = None) -> Table:
    if n != 1 or append is not None or not isinstance(prepend, Table) or prepend.shape[dim] != 1:
        raise UnknownTableError

    def at(coordinates: Sequence[Term]) -> Term:
        def there(place: Term) -> list[Term]:
            moved = list(coordinates)
            moved[dim] = place
            return moved

        here = coordinates[dim]
        first = x.at(there(0)) - prepend.at(there(0))
        later = sympy.expand(x.at(list(coordinates)) - x.at(there(here - 1)))
        if sympy.expand(first - later) != 0:
            raise UnknownTableError
        return later

    return Table(_shape(node), at)


def _cumsum(node: fx.Node, x: Table, dim: int) -> Table:
    def at(coordinates: Sequence[Term]) -> Term:
        summed = sympy.sympify(_number(x.at(coordinates)))
        if summed.free_symbols:
            raise UnknownTableError
        return summed * (coordinates[dim] + 1)

    return Table(_shape(node), at)


def _tril(node: fx.Node, x: Table, diagonal: int = 0) -> Table:
    return Table(_shape(node), lambda at: sympy.And(x.at(at), at[-1] - at[-2] <= diagonal))


def _triu(node: fx.Node, x: Table, diagonal: int = 0) -> Table:
    return Table(_shape(node), lambda at: sympy.And(x.at(at), at[-1] - at[-2] >= diagonal))


_TABLES: Mapping[str, Callable[..., Table]] = {
    "arange": _arange,
    "ones": _constant(True),
    "new_ones": _constant(True),
    "zeros": _constant(False),
    "add": _pointwise(lambda a, b: _number(a) + _number(b)),
    "sub": _pointwise(lambda a, b: _number(a) - _number(b)),
    "mul": _pointwise(lambda a, b: _number(a) * _number(b)),
    "le": _pointwise(sympy.Le),
    "lt": _pointwise(sympy.Lt),
    "ge": _pointwise(sympy.Ge),
    "gt": _pointwise(sympy.Gt),
    "eq": _pointwise(sympy.Eq),
    "ne": _pointwise(sympy.Ne),
    "and": _pointwise(sympy.And),
    "logical_and": _pointwise(sympy.And),
    "bitwise_and": _pointwise(sympy.And),
    "invert": _pointwise(sympy.Not),
    "logical_not": _pointwise(sympy.Not),
    "bitwise_not": _pointwise(sympy.Not),
    "unsqueeze": _unsqueeze,
    "expand": _expand,
    "getitem": _getitem,
    "to": _same,
    "clone": _same,
    "contiguous": _same,
    "diff": _diff,
    "cumsum": _cumsum,
    "tril": _tril,
    "triu": _triu,
}
"""By an operator's name, the table of a node that calls it, given tables and numbers in the place of nodes."""

_ELSEWHERE = {"dtype", "device", "pin_memory", "layout", "requires_grad", "memory_format"}
"""Arguments that change no value, but that dtypes may round: `_shape` takes integers and truth values alone."""


def table_of(nodes: Sequence[fx.Node]) -> Table:
    """The table of the last of these nodes, of which each reads those before it and symbolic sizes alone.

    Raises:
        UnknownTableError: a node calls something of which no table is known.
    """
    known: dict[fx.Node, Any] = {}
    for node in nodes:
        if isinstance(value(node), torch.SymInt):
            known[node] = value(node)
            continue
        make = _TABLES.get(called(node).strip("_"))
        if make is None:
            raise UnknownTableError
        args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
        try:
            known[node] = make(node, *args, **{name: x for name, x in kwargs.items() if name not in _ELSEWHERE})
        except TypeError as error:  # called in a way that the table does not know
            raise UnknownTableError from error
    table: Table = known[nodes[-1]]
    return table


def conditions(table: Table) -> tuple[set[Term], Term, Term]:
    """What has to hold for a truth value of the table, as terms that are then not negative, with row and column.

    Raises:
        UnknownTableError: a truth value is no conjunction of comparisons of integers.
    """
    at = [sympy.Symbol(f"at_{dim}", integer=True, nonnegative=True) for dim in range(len(table.shape))]
    term = table.seen_in(at)
    found = set()
    for part in sympy.And.make_args(term):
        if part == sympy.true:
            continue
        if isinstance(part, sympy.Le | sympy.Lt):
            least = part.rhs - part.lhs
        elif isinstance(part, sympy.Ge | sympy.Gt):
            least = part.lhs - part.rhs
        else:
            raise UnknownTableError
        least = sympy.expand(least - 1 if isinstance(part, sympy.StrictGreaterThan | sympy.StrictLessThan) else least)
        if not least.is_nonnegative:
            found.add(least)
    return found, at[-2], at[-1]
