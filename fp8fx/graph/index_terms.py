"""Tensors as functions of their coordinates, for what holds whatever the sizes are.

    arange(s)[None, :] <= arange(s)[:, None]    is    (i, j) -> j <= i

It knows the operators that masks are made of, of int64 and of truth values. Of anything else a table is not known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


def _term(size: Any) -> Term:
    """A number of the graph, such as a size, as sympy has it."""
    if isinstance(size, torch.SymInt):
        return size.node.expr
    if isinstance(size, bool) or not isinstance(size, int):
        raise UnknownTableError
    return sympy.Integer(size)


def _at_least_zero(place: Term) -> Term:
    """A place counted from the front; those from the back depend on the size."""
    if not place.is_nonnegative:
        raise UnknownTableError
    return place


class Table:
    """A tensor of int64 or of truth values.

    Args:
        node: the node whose value it is.
        at: its value at coordinates, one a dimension.

    Raises:
        UnknownTableError: the node's value is not known, or of another dtype. Narrower integers overflow.
    """

    def __init__(self, node: fx.Node, at: Callable[[tuple[Term, ...]], Term]) -> None:
        x = value(node)
        if not isinstance(x, Tensor) or x.dtype not in (torch.bool, torch.int64):
            raise UnknownTableError
        self.shape = tuple(_term(size) for size in x.shape)
        self.is_bool = x.dtype == torch.bool
        self._at = at
        self._terms: dict[tuple[Term, ...], Term] = {}

    def at(self, coordinates: Sequence[Term]) -> Term:
        """Its value there."""
        place = tuple(coordinates)
        if place not in self._terms:
            self._terms[place] = self._at(place)
        return self._terms[place]

    def seen_in(self, coordinates: Sequence[Term]) -> Term:
        """Its value where it is broadcast: at the last coordinates, the first of a dimension that is repeated."""
        last = coordinates[len(coordinates) - len(self.shape) :]
        return self.at([sympy.Integer(0) if size == 1 else x for size, x in zip(self.shape, last, strict=True)])


def _pointwise(function: Callable[..., Term], of_bool: bool) -> Callable[..., Table]:
    """The table of an operator on truth values alone, or on integers alone."""

    def table(node: fx.Node, *operands: Any) -> Table:
        if any(isinstance(x, Table) and x.is_bool != of_bool for x in operands):
            raise UnknownTableError
        if of_bool and not all(isinstance(x, Table) for x in operands):
            raise UnknownTableError

        def at(coordinates: Sequence[Term]) -> Term:
            return function(*(x.seen_in(coordinates) if isinstance(x, Table) else _term(x) for x in operands))

        return Table(node, at)

    return table


def _arange(node: fx.Node, *bounds: Any) -> Table:
    start = _term(bounds[0]) if len(bounds) > 1 else sympy.Integer(0)
    step = _term(bounds[2]) if len(bounds) > 2 else sympy.Integer(1)
    return Table(node, lambda at: start + step * at[0])


def _all_true(node: fx.Node, *sizes: Any) -> Table:
    table = Table(node, lambda at: sympy.true)
    if not table.is_bool:
        raise UnknownTableError
    return table


def _copy(node: fx.Node, x: Table, *_: Any) -> Table:
    """A copy, perhaps on another device."""
    table = Table(node, x.at)
    if table.is_bool != x.is_bool:
        raise UnknownTableError
    return table


def _expand(node: fx.Node, x: Table, *_: Any) -> Table:
    return Table(node, x.seen_in)


def _unsqueeze(node: fx.Node, x: Table, dim: int) -> Table:
    dim %= len(x.shape) + 1
    return Table(node, lambda at: x.at([*at[:dim], *at[dim + 1 :]]))


def _getitem(node: fx.Node, x: Table, index: Any) -> Table:
    places = index if isinstance(index, tuple) else (index,)
    tables = [place for place in places if isinstance(place, Table)]
    if len(tables) == len(places) == len(x.shape) and not any(table.is_bool for table in tables):
        return Table(node, lambda at: x.at([_at_least_zero(table.seen_in(at)) for table in tables]))
    if tables or Ellipsis in places:
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
                start = 0 if place.start is None else place.start
                inner.append(rest.pop(0) + _at_least_zero(_term(start)))
            else:
                inner.append(_at_least_zero(_term(place)))
        return x.at([*inner, *rest])

    return Table(node, at)


def _diff(node: fx.Node, x: Table, *, prepend: Table, dim: int = -1) -> Table:
    if x.is_bool or prepend.is_bool or prepend.shape[dim] != 1:
        raise UnknownTableError

    def at(coordinates: Sequence[Term]) -> Term:
        def there(place: Term) -> list[Term]:
            moved = list(coordinates)
            moved[dim] = place
            return moved

        zero = sympy.Integer(0)
        first = x.at(there(zero)) - prepend.at(there(zero))
        later = sympy.expand(x.at(coordinates) - x.at(there(coordinates[dim] - 1)))
        if sympy.expand(first - later) != 0:
            raise UnknownTableError
        return later

    return Table(node, at)


def _cumsum(node: fx.Node, x: Table, dim: int) -> Table:
    """Of equal values; how often a truth value holds."""

    def at(coordinates: Sequence[Term]) -> Term:
        summed = x.at(coordinates)
        if x.is_bool:
            if summed not in (sympy.true, sympy.false):
                raise UnknownTableError
            summed = sympy.Integer(bool(summed))
        if summed.free_symbols:
            raise UnknownTableError
        return summed * (coordinates[dim] + 1)

    return Table(node, at)


def _triangle(keeps: Callable[[Term, Term], Term]) -> Callable[..., Table]:
    """What tril or triu keeps, by how far a column lies behind the row, and the diagonal."""

    def table(node: fx.Node, x: Table, diagonal: Any = 0) -> Table:
        if not x.is_bool:
            raise UnknownTableError
        return Table(node, lambda at: sympy.And(x.at(at), keeps(at[-1] - at[-2], _term(diagonal))))

    return table


_TABLES: Mapping[str, Callable[..., Table]] = {
    "arange": _arange,
    "ones": _all_true,
    "new_ones": _all_true,
    "add": _pointwise(lambda a, b: a + b, of_bool=False),
    "sub": _pointwise(lambda a, b: a - b, of_bool=False),
    "mul": _pointwise(lambda a, b: a * b, of_bool=False),
    "le": _pointwise(sympy.Le, of_bool=False),
    "lt": _pointwise(sympy.Lt, of_bool=False),
    "ge": _pointwise(sympy.Ge, of_bool=False),
    "gt": _pointwise(sympy.Gt, of_bool=False),
    "eq": _pointwise(sympy.Eq, of_bool=False),
    "ne": _pointwise(sympy.Ne, of_bool=False),
    "and": _pointwise(sympy.And, of_bool=True),
    "and_": _pointwise(sympy.And, of_bool=True),
    "logical_and": _pointwise(sympy.And, of_bool=True),
    "bitwise_and": _pointwise(sympy.And, of_bool=True),
    "invert": _pointwise(sympy.Not, of_bool=True),
    "logical_not": _pointwise(sympy.Not, of_bool=True),
    "bitwise_not": _pointwise(sympy.Not, of_bool=True),
    "unsqueeze": _unsqueeze,
    "expand": _expand,
    "getitem": _getitem,
    "to": _copy,
    "clone": _copy,
    "contiguous": _copy,
    "diff": _diff,
    "cumsum": _cumsum,
    "tril": _triangle(sympy.Le),
    "triu": _triangle(sympy.Ge),
}
"""By an operator's name, the table of a node that calls it, given tables and numbers in the place of nodes."""

_DESCRIPTIONS = {"dtype", "device", "pin_memory", "layout", "requires_grad", "memory_format"}
"""Arguments that say of what kind the result is: `Table` reads that from the node's value."""


def table_of(nodes: Sequence[fx.Node]) -> Table:
    """The table of the last of these nodes, of which each reads those before it and symbolic sizes alone.

    Raises:
        UnknownTableError: a node calls something of which no table is known.
    """
    tables: dict[fx.Node, Any] = {}
    for node in nodes:
        if isinstance(value(node), torch.SymInt):
            tables[node] = value(node)
            continue
        make = _TABLES.get(called(node))
        if make is None:
            raise UnknownTableError
        args, kwargs = fx.map_arg((node.args, node.kwargs), tables.__getitem__)
        try:
            tables[node] = make(node, *args, **{name: x for name, x in kwargs.items() if name not in _DESCRIPTIONS})
        except TypeError as error:  # called in a way that the table does not know
            raise UnknownTableError from error
    last: Table = tables[nodes[-1]]
    return last


def conditions(table: Table) -> tuple[set[Term], Term, Term]:
    """What has to hold where a table (*, L, S) is true, as terms that are then not negative, with row and column.

    Raises:
        UnknownTableError: it has no truth values, or they are no conjunction of comparisons.
    """
    if not table.is_bool or len(table.shape) < 2:
        raise UnknownTableError
    at = [sympy.Symbol(f"at_{dim}", integer=True, nonnegative=True) for dim in range(len(table.shape))]
    terms = set()
    for part in sympy.And.make_args(table.seen_in(at)):
        if part == sympy.true:
            continue
        if isinstance(part, sympy.Le | sympy.Lt):
            least = part.rhs - part.lhs
        elif isinstance(part, sympy.Ge | sympy.Gt):
            least = part.lhs - part.rhs
        else:
            raise UnknownTableError
        least = sympy.expand(least - 1 if isinstance(part, sympy.Lt | sympy.Gt) else least)
        if not least.is_nonnegative:
            terms.add(least)
    return terms, at[-2], at[-1]
