"""The linears of a model that are in none of its graphs, which a report of the graphs alone would not show."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from fp8fx.reasons import PlaceReason
from fp8fx.report import Report, Row
from fp8fx.torch_internals import Convolution, FakeTensor, NormBase

__all__ = ["Unseen"]

_NO_LINEARS = (nn.Embedding, nn.EmbeddingBag, Convolution, NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
"""Modules of torch whose parameters multiply no matrix."""

_IN_NO_GRAPH = PlaceReason.IN_NO_GRAPH()


@dataclass(frozen=True)
class _Linear:
    """A weight of the model.

    Attributes:
        path, name, form, k, n: as Row's; None if a size is not known.
        parameters: what holds it, by the model's names; several if a parametrization computes the weight.
    """

    path: str
    name: str
    form: str
    k: int | None
    n: int | None
    parameters: dict[str, Tensor]

    @property
    def row(self) -> Row:
        """Of the report."""
        return Row(
            path=self.path,
            name=self.name,
            form=self.form,
            m="?",
            k="?" if self.k is None else str(self.k),
            n="?" if self.n is None else str(self.n),
            bsz=None,
            bsz2=None,
            op=None,
            executor=None,
            gemms=(),
            reason=str(_IN_NO_GRAPH),
            remark="",
            flops=None,
            in_graph=False,
            kind=_IN_NO_GRAPH.kind,
        )


def _without_wrappers(path: str) -> str:
    """The path without the modules that torch.compile has put into the model."""
    return ".".join(part for part in path.split(".") if part != "_orig_mod")


def _weights(module: nn.Module, prefix: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The module's own parameters: the name of each, and the tensors that hold it by the model's names.

    Args:
        module: one of the model's.
        prefix: what its parameters' names begin with in the model.
    """
    for name, x in module._parameters.items():
        if x is not None:
            yield name, {prefix + name: x}
    if is_parametrized(module):
        for name, originals in module.parametrizations.items():  # type: ignore[operator, union-attr]
            yield name, dict(originals.named_parameters(f"{prefix}parametrizations.{name}"))


def _is_matrix(x: Tensor) -> bool:
    """Whether it has rows and columns: a token or a bias (1, 1, D) has not."""
    return not is_lazy(x) and sum(size > 1 for size in x.shape) >= 2


def _linears(model: nn.Module) -> Iterator[_Linear]:
    """The model's linears, and its other parameters that may multiply a matrix."""
    for full_path, module in model.named_modules():
        if isinstance(module, _NO_LINEARS) or "parametrizations" in full_path.split("."):
            continue
        path = _without_wrappers(full_path)
        for name, parameters in _weights(module, f"{full_path}." if full_path else ""):
            full_name = f"{path}.{name}" if path else name
            form = type(module).__name__
            is_loaded = not any(map(is_lazy, parameters.values()))
            if isinstance(module, nn.Linear) and name == "weight" and is_loaded:
                yield _Linear(path, full_name, form, module.in_features, module.out_features, parameters)
            elif any(map(_is_matrix, parameters.values())):
                yield _Linear(path, full_name, form, None, None, parameters)


class Unseen:
    """Which linears of a model its graphs do not read; none of a function, whose weights are not known.

    A weight counts as read if a graph reads it for anything, such as a table of embeddings that is tied to it.

    Args:
        called: what is called: a module, a method of one, or a function.
    """

    def __init__(self, called: Any) -> None:
        model = called if isinstance(called, nn.Module) else getattr(called, "__self__", None)
        self._model = model if isinstance(model, nn.Module) else None
        self._read: set[str] = set()

    def read(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        """Takes note of what this graph of the model reads.

        Call it while the model runs: FSDP has other tensors then.
        """
        if self._model is None:
            return
        placeholders = gm.graph.find_nodes(op="placeholder")
        given = [x for node, x in zip(placeholders, example_inputs, strict=False) if node.users]
        read = {id(x) for x in (*given, *gm.parameters())}
        # DDPOptimizer splits a graph, and gives fake tensors in place of the parameters.
        mode = next((x.fake_mode for x in given if isinstance(x, FakeTensor)), None)
        for name, x in self._model.named_parameters(remove_duplicate=False):
            given_as = x if mode is None or is_lazy(x) else mode.from_tensor(x, static_shapes=True)
            if not read.isdisjoint((id(x), id(given_as))):
                self._read.add(name)

    def added_to(self, report: Report) -> Report:
        """The report of the model's graphs, with a row for each linear that none of them reads."""
        linears = [] if self._model is None else list(_linears(self._model))
        unseen = [linear for linear in linears if self._read.isdisjoint(linear.parameters)]
        return dataclasses.replace(
            report,
            rows=(*report.rows, *(linear.row for linear in unseen)),
            values=_values(linears),
            unseen_values=_values(unseen),
        )


def _values(linears: Sequence[_Linear]) -> int:
    """How many values their weights have; a tensor that several of them hold counts once."""
    sizes = {id(x): x.numel() for linear in linears for x in linear.parameters.values()}
    return sum(sizes.values())
