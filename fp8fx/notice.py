"""The warning that nothing of a model is FP8: one for all its graphs, when the call that compiled them ends."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

from torch import fx, nn

from fp8fx.errors import FP8Warning
from fp8fx.report import Report
from fp8fx.torch_internals import compiled_call

__all__ = ["Notice"]


def _has_weights(compiled: Callable[..., Any] | None) -> bool:
    """Whether it is a module with parameters, or a method of one; an optimizer's step is not."""
    model = getattr(compiled, "__self__", getattr(compiled, "__wrapped__", None))
    return isinstance(model, nn.Module) and next(model.parameters(), None) is not None


class Notice:
    """What the graphs of one function behind torch.compile have come to: whether to say that nothing of it is FP8.

    A graph break gives a model graphs without linears besides those with linears, so no graph alone can tell.
    """

    _notices: ClassVar[weakref.WeakKeyDictionary[Any, Notice]] = weakref.WeakKeyDictionary()
    """By what torch.compile has made."""

    def __init__(self) -> None:
        self._reports: list[Report] = []
        self._is_due = False
        self._is_settled = False

    @classmethod
    def take(cls, gm: fx.GraphModule, report: Report, is_settled: bool) -> None:
        """Takes note of a graph that is being compiled.

        The warning comes if nothing is settled when the call ends, once for each torch.compile. It does not come for a
        function that multiplies no weight, such as an optimizer's step or a graph of compiled autograd.

        Args:
            gm: the graph, as Dynamo gives it.
            report: of its rewrite.
            is_settled: whether some of it is FP8, or the user was told why it is not.
        """
        call = compiled_call()
        notice = cls._notices.setdefault(call["self"], cls()) if call else cls()
        notice._is_settled |= is_settled
        notice._reports.append(report)
        in_module = any(node.meta.get("nn_module_stack") for node in gm.graph.nodes)
        notice._is_due |= in_module or any(row.name for row in report.rows) or _has_weights(call.get("fn"))
        if not call:
            notice._end()
        elif notice._end not in call["cleanups"]:
            call["cleanups"].append(notice._end)

    def _end(self) -> None:
        """Warns if the warning is due, when the call that compiled the graphs has ended."""
        report = Report.merged(self._reports)
        self._reports.clear()
        if not self._is_due or self._is_settled:
            return
        self._is_settled = True
        text = f"fp8: {report.summary}; fp8fx.explain(model, *args) gives the reasons"
        warnings.warn(text, FP8Warning, stacklevel=2)
