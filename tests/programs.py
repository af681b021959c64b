"""Random small modules as source text: the writer of the fuzzer's programs."""

from __future__ import annotations

import collections
import linecache
import random
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tests.written import NAMES, PLACES, WAYS

__all__ = ["Line", "Program", "write"]

SIZES = (1, 2, 3, 5, 8, 16, 17, 24, 33, 64, 70)
DTYPES = (torch.float32, torch.float32, torch.float16, torch.bfloat16)


def laid(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """`x` in memory with these strides."""
    return x if x.stride() == strides else torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


@dataclass(frozen=True)
class Line:
    """One statement of a forward: what it assigns (nothing where it only acts), what it computes, and how many matmuls of it the report
    shows and rewrites."""

    name: str
    written: str
    by_hand: str
    rows: int = 0
    rewritten: int = 0

    def text(self, hand: bool) -> str:
        return (f"{self.name} = " if self.name else "") + (self.by_hand if hand else self.written)


@dataclass(frozen=True)
class Program:
    """A module as source.

    Attributes:
        seed: of its weights and inputs, and of what is checked.
        weights: statements of its constructor.
        inputs: expressions.
        lines: of its forward.
        outputs: the names that it returns.
        traceable: whether symbolic_trace can trace it.
    """

    seed: int
    weights: tuple[str, ...]
    inputs: tuple[str, ...]
    lines: tuple[Line, ...]
    outputs: tuple[str, ...]
    traceable: bool

    @property
    def source(self) -> str:
        arguments = ", ".join(f"x{i}" for i in range(len(self.inputs)))
        returned = f"return {', '.join(self.outputs)}" + ("," if len(self.outputs) == 1 else "")

        def body(*lines: str) -> str:
            return "".join(f"        {line}\n" for line in lines)

        return (
            f"class Model(nn.Module):  # seed {self.seed}; inputs: {', '.join(self.inputs)}\n"
            f"    def __init__(self):\n{body('super().__init__()', *self.weights)}"
            f"    def forward(self, {arguments}):\n{body(*(line.text(False) for line in self.lines), returned)}"
            f"    def by_hand(self, mm, {arguments}):\n{body(*(line.text(True) for line in self.lines), returned)}"
        )

    def model(self) -> Any:
        name, source = f"<fuzzed {self.seed}>", self.source
        linecache.cache[name] = len(source), None, source.splitlines(True), name
        names = {**NAMES, "laid": laid}
        exec(compile(source, name, "exec"), names)
        torch.manual_seed(self.seed)
        return names["Model"]()

    def arguments(self, grad: bool) -> list[Tensor]:
        torch.manual_seed(self.seed + 1)
        return [x.requires_grad_(grad and x.is_floating_point()) for x in (eval(text, dict(NAMES)) for text in self.inputs)]


_POINTWISE = (
    *("F.gelu({x})", "F.silu({x})", "torch.tanh({x})", "{x}.relu()", "torch.sigmoid({x})", "{x} * 0.5", "1 - {x}", "-{x}"),
    *("F.layer_norm({x}, ({k},))", "F.rms_norm({x}, ({k},))", "F.softmax({x}, -1)", "{x} / (1 + {x}.abs().amax(-1, keepdim=True))"),
    *("{x} - {x}.mean(-1, keepdim=True)", "F.normalize({x}, dim=-1)", "{x}.clamp(-1, 1)", "torch.where({x} > 0, {x}, 0.1 * {x})"),
)
_VIEWS = (
    *("{x}.transpose(-1, -2)", "{x}.transpose(0, -1)", "{x}.transpose(0, 1)", "{x}.flatten(0, 1)", "{x}.flatten()", "{x}.reshape(-1, {k})"),
    *("{x}.view(-1, {k})", "{x}.unsqueeze(0)", "{x}.unsqueeze(-1)", "{x}.unsqueeze(1)", "{x}.squeeze()", "{x}[0]", "{x}[:1]"),
    *("{x}.contiguous()", "{x}.clone()", "{x}.movedim(-1, 0)", "{x}[:, :0]", "{x}.unflatten(-1, (2, -1))", "{x}.chunk(2, -1)[1]"),
    *("{x}.expand(2, {d})", "{x}.detach()", "torch.flip({x}, (0,))", "{x}.repeat({d})", "{x}[1:]", "{x}.view(-1)", "{x}[..., ::2]"),
)
_PAIRS = ("{x} + {y}", "{x} * {y}", "{x} - 0.5 * {y}", "torch.cat([{x}, {y}], -1)", "torch.cat([{x}, {y}])", "torch.stack([{x}, {y}])")
_ACTS = (
    *("{x}.mul_(0.5)", "{x}.add_(1)", "F.relu({x}, inplace=True)", "{x}.select(-1, 0).zero_()", "{x}.copy_({y})", "{x}.add_({y})"),
    *("{x}.t_()", "{x}.zero_()", "{x}.mT.mul_(2)", "{x}.view(-1).neg_()"),
)
_CASTS = ("{x}.to(torch.bfloat16)", "{x}.half()", "{x}.float()", "{x}.to(torch.float32)", "{x}.double()", "{x}.type(torch.float16)")
_INPUTS = ("torch.randn({s})", "torch.randn({s})", "torch.randn({s}).mT", "torch.randn({s}, 2)[..., 0]", "torch.randn(2, {s}).sum(0)")


class _Writer:
    """Writes one program, running each line as it goes to know what is possible."""

    def __init__(self, seed: int) -> None:
        self.seed, self.rng = seed, random.Random(seed)
        self.holder: Any = nn.Module()
        self.values: dict[str, Tensor] = {}
        self.weights: list[str] = []
        self.shared: dict[tuple[int, int, torch.dtype], list[tuple[str, bool]]] = collections.defaultdict(list)
        self.inputs: list[str] = []
        self.lines: list[Line] = []
        self.traceable = True

    def weight(self, statement: str) -> None:
        exec(statement, {**NAMES, "self": self.holder})
        self.weights.append(statement)

    def registered(self, shape: str, dtype: torch.dtype, scale: float, parameter: bool = False) -> str:
        name, kind = f"w{len(self.weights)}", 0 if parameter else self.rng.random()
        value = f"torch.randn({shape}, dtype={dtype}) * {scale:.2g}"
        if kind < 0.8:
            self.weight(f"self.{name} = nn.Parameter({value})")
        elif kind < 0.95:
            self.weight(f"self.register_buffer('{name}', {value})")
        else:
            self.weight(f"self.{name} = {value}")
        return f"self.{name}"

    def matrix(self, n: int, k: int, dtype: torch.dtype, parameter: bool) -> tuple[str, bool]:
        """An expression of a weight, and whether it is (K, N)."""
        rng = self.rng
        if not parameter and self.shared[n, k, dtype] and rng.random() < 0.4:
            return rng.choice(self.shared[n, k, dtype])
        if rng.random() < 0.15:
            name = f"fc{len(self.weights)}"
            self.weight(f"self.{name} = nn.Linear({k}, {n}, dtype={dtype})")
            found = f"self.{name}.weight", False
        else:
            place = rng.choice(PLACES)
            kept, cast = dtype, ""
            if dtype != torch.float32 and rng.random() < 0.3:
                kept = torch.float32
                cast = rng.choice((f".to({dtype})", ".half()" if dtype == torch.float16 else ".bfloat16()"))
            registered = self.registered(place.shape.format(n=n, k=k), kept, max(k, 1) ** -0.5, parameter)
            found = place.view.format(p=registered, n=n, k=k) + cast, place.transposed
        self.shared[n, k, dtype].append(found)
        return found

    def linear(self, x: str, value: Tensor) -> Line:
        rng, k = self.rng, value.shape[-1]
        n = rng.choice((*SIZES, k, k, k))
        ways = [way for way in WAYS if value.dim() in way.dims]
        if rng.random() < 0.8:
            ways = [way for way in ways if way.rewritten]
        way = rng.choice(ways)
        dtype = value.dtype if value.dtype != torch.float64 or rng.random() < 0.5 else torch.float64
        if rng.random() < 0.2 and "mm" in way.by_hand:
            name = f"fc{len(self.weights)}"
            bias = rng.random() < 0.7
            self.weight(f"self.{name} = nn.Linear({k}, {n}, bias={bias}, dtype={dtype})")
            written = f"self.{name}({rng.choice(('', 'input='))}{x})"
            hand = f"mm({x}, self.{name}.weight.t()" + (f", bias=self.{name}.bias)" if bias else ")")
            rows = 1
        else:
            # Computed of other constants than parameters, it is one itself to symbolic_trace.
            weight, transposed = self.matrix(n, k, dtype, parameter=not way.rewritten)
            turn = rng.choice((".t()", ".T", ".mT", ".transpose(0, 1)"))
            texts = {"x": x, "k": k, "n": n, "w": weight + turn * transposed, "v": weight + turn * (not transposed)}
            if "{b}" in way.written:
                texts["b"] = self.registered(f"{n}", dtype, 1)
            if "{c}" in way.written:
                texts["c"] = self.registered(f"{value.shape[0]}, {n}", dtype, 1)
            written, hand, rows = way.written.format(**texts), way.by_hand.format(**texts), way.rows
        fits = k > 0 and n > 0 and value.dtype != torch.float64
        if hand == written or not fits:
            return Line("y", written, written, rows)
        return Line("y", written, hand, rows, rows)

    def checkpointed(self, x: str, value: Tensor) -> Line:
        line = self.linear("t", value)
        self.traceable = False
        act = self.rng.choice(("F.gelu({})", "torch.tanh({})", "{}"))
        written, hand = (f"checkpoint(lambda t: {act.format(text)}, {x}, use_reentrant=False)" for text in (line.written, line.by_hand))
        return replace(line, written=written, by_hand=hand)

    def candidate(self) -> Line:
        rng = self.rng
        names = list(self.values)
        x = rng.choice(names[-3:] if rng.random() < 0.7 else names)
        value = self.values[x]
        kind = rng.random()
        if kind < 0.45 and value.dim() and value.is_floating_point():
            return self.checkpointed(x, value) if rng.random() < 0.01 else self.linear(x, value)
        like = [y for y in names if y != x and self.values[y].shape == value.shape]
        texts: dict[str, Any] = {"x": x, "y": rng.choice(like or [x]), "k": value.shape[-1] if value.dim() else 1}
        texts["d"] = ", ".join(map(str, value.shape)) or "1"
        table = _POINTWISE if kind < 0.65 else _VIEWS if kind < 0.83 else _PAIRS if kind < 0.9 else _CASTS if kind < 0.94 else _ACTS
        text = rng.choice(table).format(**texts)
        if ".t_()" in text and (x.startswith("x") or sum(y is value for y in self.values.values()) > 1):
            text = f"{x}.neg_()"  # of an input, Dynamo does not take it
        return Line("" if table is _ACTS else "y", text, text)

    def add(self, line: Line) -> None:
        scope = {**NAMES, **self.values, "self": self.holder}
        try:
            with torch.no_grad():
                found = eval(line.written, scope)
        except (RuntimeError, ValueError, IndexError, NotImplementedError, TypeError):
            return
        if not isinstance(found, Tensor) or found.numel() > 20_000 or found.dim() > 4:
            return
        if not line.name:
            self.lines.append(line)
            return
        name = f"y{len(self.lines)}"
        hand = line.by_hand
        if line.rewritten and not hand.startswith("checkpoint"):
            hand = f"laid({hand}, {found.stride()})"
        self.values[name] = found
        self.lines.append(replace(line, name=name, by_hand=hand))

    def program(self) -> Program:
        rng = self.rng
        for i in range(rng.choice((1, 1, 2))):
            sizes = [rng.choice(SIZES) for _ in range(rng.choice((1, 2, 2, 2, 3, 3, 4)))]
            if rng.random() < 0.03:
                sizes[0] = 0
            shape = ", ".join(map(str, [*(min(s, 9) for s in sizes[:-1]), sizes[-1]]))
            text = rng.choice(_INPUTS if len(sizes) > 1 else _INPUTS[:2]).format(s=shape)
            text += {torch.float32: "", torch.float16: ".half()", torch.bfloat16: ".bfloat16()"}[rng.choice(DTYPES)]
            self.values[f"x{i}"] = eval(text, dict(NAMES))
            self.inputs.append(text)
        for _ in range(rng.randint(3, 14)):
            self.add(self.candidate())
        if not any(line.rows for line in self.lines):
            for x in list(self.values):
                if self.values[x].dim():
                    self.add(self.linear(x, self.values[x]))
        made = [name for name in self.values if name.startswith("y")] or ["x0"]
        outputs = tuple(dict.fromkeys([*rng.sample(made, min(len(made), rng.choice((0, 1, 1, 2)))), made[-1]]))
        return Program(self.seed, tuple(self.weights), tuple(self.inputs), tuple(self.lines), outputs, self.traceable)


def write(seed: int) -> Program:
    """The program of a seed."""
    torch.manual_seed(seed)
    return _Writer(seed).program()
