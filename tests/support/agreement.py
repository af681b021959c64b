"""What the fuzzer compares: a call of a module and the same by hand, where each FP8 product is held to the error of its
rounding."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.debugging import aot_eager

from fp8fx import backend, lowering
from fp8fx.recipes.quantize import sqnr
from fp8fx.recipes.recipe import RECIPES, Cast
from fp8fx.report import Report
from tests.support.programs import Program
from tests.support.written import fp8, same

__all__ = ["Bounded", "Counted", "DisagreementError", "Lowered", "Merged", "Run"]
__all__ += ["demand_close", "demand_rows", "demand_same", "merged", "run"]


class DisagreementError(AssertionError):
    """A graph on which two ways do not agree."""


class Merged(NamedTuple):
    """What a frozen weight was merged into: all siblings' weights and biases side by side, and where its own columns
    begin."""

    weight: Tensor
    bias: Tensor | None
    start: int


def _error(x: Tensor, cast: Cast, dims: tuple[int, ...], amax: Tensor | None = None) -> Tensor:
    """How far a value in E4M3 may lie from its own: half a step, relative, or of the lowest binade."""
    if amax is None:
        amax = x.abs().amax(dims, keepdim=True) if x.numel() else x.new_zeros(())
    return x.abs() * 2**-4 + (amax / cast.format.target).clamp(min=2**-125) * 2**-10


class Bounded:
    """`fp8(recipe)`, where each product must lie within the error of its rounding.

    Args:
        recipe: its name.
        frozen: the weights lie in memory as frozen ones, by whose layout the CPU sums in another order.
        merged: of a frozen weight that was merged with its siblings, by the number of the call, what it was merged
            into.
        nudged: every product is off by one place, the last of its dtype or autocast's, up or down at random.

    Attributes:
        operands: the weight and the bias of each call.
    """

    def __init__(
        self, recipe: str, frozen: bool = False, merged: Mapping[int, Merged] | None = None, nudged: bool = False
    ) -> None:
        self.recipe, self.mm, self.frozen, self.merged = recipe, fp8(recipe), frozen, merged or {}
        self.nudged, self.signs = nudged, torch.Generator().manual_seed(0)
        self.operands: list[tuple[Tensor, Tensor | None]] = []

    def __call__(self, a: Tensor, b: Tensor, bias: Tensor | None = None, offs: Tensor | None = None) -> Tensor:
        b = (b.mT * 1).contiguous().mT if self.frozen else b
        into = self.merged.get(len(self.operands))
        self.operands.append((b, bias))
        if into is not None:
            y: Tensor = self.mm(a, into.weight, into.bias).narrow(-1, into.start, b.shape[1])
            self._hold(y, a, b, bias, into.weight)
        elif offs is None:
            y = self.mm(a, b, bias)
            self._hold(y, a, b, bias)
        else:
            y = self.mm(a, b, offs=offs)
            for weight, (first, last) in zip(b, itertools.pairwise([0, *offs.tolist()]), strict=True):
                self._hold(y[first:last], a[first:last], weight, rows=True)
        return self._nudge(y) if self.nudged else y

    def _nudge(self, y: Tensor) -> Tensor:
        device = y.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else y.dtype
        signs = torch.randint(2, y.shape, generator=self.signs).to(y.device) * 2 - 1
        return y + (y.detach() * signs * max(torch.finfo(dtype).eps, torch.finfo(y.dtype).eps)).to(y.dtype)

    @torch.no_grad()
    def _hold(
        self,
        y: Tensor,
        a: Tensor,
        b: Tensor,
        bias: Tensor | None = None,
        whole: Tensor | None = None,
        rows: bool = False,
    ) -> None:
        """`whole` is what the weight's scale is of, if of more than the weight; `rows` says that each row of `a` has
        one of its own."""
        gemm = RECIPES[self.recipe].forward
        assert gemm is not None
        left, right = a.to(y.dtype).double(), b.to(y.dtype).double()  # as autocast casts them
        tensor = gemm.rhs.granularity == "tensor"
        of_a = _error(left, gemm.lhs, (-1,) if rows or gemm.lhs.granularity != "tensor" else tuple(range(a.dim())))
        of_b = _error(
            right,
            gemm.rhs,
            (0, 1) if tensor else (0,),
            whole.double().abs().amax() if whole is not None and tensor else None,
        )
        most = (left.abs() + of_a) @ (right.abs() + of_b)
        addend = 0 if bias is None else bias.to(y.dtype).double()
        info = torch.finfo(y.dtype)
        rounding = (most + abs(addend)) * (4 * info.eps + a.shape[-1] * 2**-23) + 4 * a.shape[-1] * info.smallest_normal
        far = (y.double() - (left @ right + addend)).abs() > most - left.abs() @ right.abs() + rounding
        if bool((far & (most < info.max / 2)).any()):
            shapes = f"{tuple(a.shape)} @ {tuple(b.shape)}"
            raise DisagreementError(
                f"{self.recipe}: a product is further from the exact one than E4M3 rounds, {shapes}"
            )


def merged(report: Report, operands: Sequence[tuple[Tensor, Tensor | None]], recipe: str) -> dict[int, Merged] | None:
    """What each weight was merged into, by the number of its matmul; None where the report's rows are not those of
    `operands`.

    Raises:
        DisagreementError: weights that differ by more than 64x share a scale.
    """
    if len(report.rewritten) != len(operands):
        return None
    siblings: dict[frozenset[str], list[int]] = collections.defaultdict(list)
    for i, row in enumerate(report.rewritten):
        for remark in row.remark.split("; "):
            if remark.startswith("one GEMM with"):
                siblings[
                    frozenset({row.name, *remark.removeprefix("one GEMM with").strip().split(", ")} - {""})
                ].append(i)
    found, forward = {}, RECIPES[recipe].forward
    assert forward is not None
    for group in siblings.values():
        weights, biases = [operands[i][0] for i in group], [operands[i][1] for i in group]
        amaxes = [float(w.abs().amax()) for w in weights]
        if forward.rhs.granularity == "tensor" and max(amaxes) > 64 * min(amaxes):
            raise DisagreementError(f"weights of amaxes {amaxes} share a scale")
        some = next((b for b in biases if b is not None), None)
        wide, start = torch.cat(weights, 1).mT.contiguous().mT, 0
        addends = (
            []
            if some is None
            else [some.new_zeros(w.shape[1]) if b is None else b for w, b in zip(weights, biases, strict=True)]
        )
        for i, weight in zip(group, weights, strict=True):
            found[i] = Merged(wide, torch.cat(addends) if addends else None, start)
            start += weight.shape[1]
    return found


@dataclass
class Run:
    """What a call gave: its results, the inputs after it, and the gradients of inputs and parameters."""

    results: dict[str, Tensor]
    strides: list[tuple[int, ...]] = field(default_factory=list)


def _gradients(outputs: Sequence[Tensor], of: Sequence[Tensor]) -> list[Tensor | None]:
    torch.manual_seed(0)
    wanted = [(y, torch.randn(y.shape).to(y.dtype)) for y in outputs if y.requires_grad]
    if not wanted:
        return []
    return list(torch.autograd.grad([y for y, _ in wanted], of, [g for _, g in wanted], allow_unused=True))


def run(
    program: Program,
    call: Callable[..., Any],
    model: nn.Module,
    grad: bool,
    sizes: Mapping[str, int] | None = None,
    values: int = 0,
) -> Run:
    """Calls it on fresh inputs of these sizes, whose values depend on `values`; buffers stay as they were."""
    inputs, kept = program.arguments(grad, sizes, values), {name: x.clone() for name, x in model.named_buffers()}
    of = [x for x in (*inputs, *model.parameters()) if x.requires_grad]
    with torch.set_grad_enabled(grad):
        with program.context():
            outputs = list(call(*inputs))
        found: dict[str, Any] = {f"output {i}": y for i, y in enumerate(outputs)}
        found |= {f"gradient {i}": g for i, g in enumerate(_gradients(outputs, of)) if g is not None} if grad else {}
    found |= {f"input {i}": x for i, x in enumerate(inputs)}
    for name, x in model.named_buffers():
        x.copy_(kept[name])
    return Run({name: x.detach() for name, x in found.items()}, [y.stride() for y in outputs])


def demand_same(what: str, expected: Run, found: Run) -> None:
    """Equal bits."""
    if found.results.keys() != expected.results.keys():
        raise DisagreementError(f"{what}: gives {sorted(found.results)}, not {sorted(expected.results)}")
    for name, x in expected.results.items():
        y = found.results[name]
        if not same(x, y):
            differs = f"{tuple(x.shape)} {x.dtype}, {tuple(y.shape)} {y.dtype}"
            if x.shape == y.shape:
                count, most = int((x != y).sum()), (x.double() - y.double()).abs().max()
                differs += f": {count} of {x.numel()} values, at most {most:.3g}"
            raise DisagreementError(f"{what}: {name} differs, {differs}")


def demand_close(what: str, expected: Run, found: Run, bound: float, nudged: Run | None = None) -> None:
    """The same shapes and dtypes, and an SQNR of at least `bound` dB where both are finite.

    Where results nearly cancel, a last place is more than that: `nudged` is what is expected of products that are off
    by one, and its error is allowed four times.
    """
    for name, x in expected.results.items():
        y = found.results[name]
        if x.shape != y.shape or x.dtype != y.dtype:
            raise DisagreementError(f"{what}: {name} is {tuple(y.shape)} {y.dtype}, not {tuple(x.shape)} {x.dtype}")
        known = x.isfinite() & y.isfinite()
        allowed = 0.0 if nudged is None else 4 * float((nudged.results[name] - x)[known].double().norm())
        if float((x[known].double() - y[known].double()).norm()) <= allowed:
            continue
        if x[known].double().norm() > 0 and (found_ := sqnr(x[known], y[known])) < bound:
            raise DisagreementError(f"{what}: {name} has an SQNR of {found_:.1f} dB, below {bound}")


def demand_rows(what: str, program: Program, report: Report, whole: bool) -> None:
    """A row a matmul, and no failure. A tracer that drops dead code leaves fewer."""
    rows, done = sum(line.rows for line in program.lines), sum(line.rewritten for line in program.lines)
    seen, rewritten = len(report.rows), len(report.rewritten)
    if report.failures or (seen != rows or rewritten != done if whole else seen > rows or rewritten > done):
        raise DisagreementError(f"{what}: {rewritten} of {seen} matmuls rewritten, expected {done} of {rows}\n{report}")


class Lowered(backend.Backend):
    """The backend, with AOTAutograd's graph run eagerly in Inductor's place."""

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        with mock.patch.object(lowering, "compile_fx", lambda new, inputs, *_, **__: aot_eager(new, inputs)):
            return super().__call__(gm, example_inputs)


class Counted:
    """AOTAutograd's graph run eagerly, and how many there were."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs += 1
        return aot_eager(gm, inputs)  # type: ignore[no-any-return]
