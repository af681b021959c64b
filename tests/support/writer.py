"""Random small modules as source text: the writer of the fuzzer's programs."""

from __future__ import annotations

import collections
import contextlib
import random
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.programs import Line, Program, names
from tests.support.written import EXPERT_PLACES, EXPERTS, NAMES, PLACES, WAYS

__all__ = ["FEATURES", "write"]

FEATURES = ("autocast", "dynamic", "freeze", "grouped")
"""What programs may have besides: autocast around the call and inside, inputs of other sizes, linears that are siblings
once frozen, and weights of several experts."""

SIZES = (1, 2, 3, 5, 8, 16, 17, 24, 33, 64, 70)
DTYPES = (torch.float32, torch.float32, torch.float16, torch.bfloat16)

_POINTWISE = (
    *(
        "F.gelu({x})",
        "F.silu({x})",
        "torch.tanh({x})",
        "{x}.relu()",
        "torch.sigmoid({x})",
        "{x} * 0.5",
        "1 - {x}",
        "-{x}",
    ),
    *(
        "F.layer_norm({x}, ({k},))",
        "F.rms_norm({x}, ({k},))",
        "F.softmax({x}, -1)",
        "{x} / (1 + {x}.abs().amax(-1, keepdim=True))",
    ),
    *(
        "{x} - {x}.mean(-1, keepdim=True)",
        "F.normalize({x}, dim=-1)",
        "{x}.clamp(-1, 1)",
        "torch.where({x} > 0, {x}, 0.1 * {x})",
    ),
)
_VIEWS = (
    *(
        "{x}.transpose(-1, -2)",
        "{x}.transpose(0, -1)",
        "{x}.transpose(0, 1)",
        "{x}.flatten(0, 1)",
        "{x}.flatten()",
        "{x}.reshape(-1, {k})",
    ),
    *(
        "{x}.view(-1, {k})",
        "{x}.unsqueeze(0)",
        "{x}.unsqueeze(-1)",
        "{x}.unsqueeze(1)",
        "{x}.squeeze()",
        "{x}[0]",
        "{x}[:1]",
    ),
    *(
        "{x}.contiguous()",
        "{x}.clone()",
        "{x}.movedim(-1, 0)",
        "{x}[:, :0]",
        "{x}.unflatten(-1, (2, -1))",
        "{x}.chunk(2, -1)[1]",
    ),
    *(
        "{x}.expand(2, {d})",
        "{x}.detach()",
        "torch.flip({x}, (0,))",
        "{x}.repeat({d})",
        "{x}[1:]",
        "{x}.view(-1)",
        "{x}[..., ::2]",
    ),
)
_PAIRS = (
    "{x} + {y}",
    "{x} * {y}",
    "{x} - 0.5 * {y}",
    "torch.cat([{x}, {y}], -1)",
    "torch.cat([{x}, {y}])",
    "torch.stack([{x}, {y}])",
)
_ACTS = (
    *(
        "{x}.mul_(0.5)",
        "{x}.add_(1)",
        "F.relu({x}, inplace=True)",
        "{x}.select(-1, 0).zero_()",
        "{x}.copy_({y})",
        "{x}.add_({y})",
    ),
    *("{x}.t_()", "{x}.zero_()", "{x}.mT.mul_(2)", "{x}.view(-1).neg_()"),
)
_CASTS = (
    "{x}.to(torch.bfloat16)",
    "{x}.half()",
    "{x}.float()",
    "{x}.to(torch.float32)",
    "{x}.double()",
    "{x}.type(torch.float16)",
)
_INPUTS = (
    "torch.randn({s})",
    "torch.randn({s})",
    "torch.randn({s}).mT",
    "torch.randn({s}, 2)[..., 0]",
    "torch.randn(2, {s}).sum(0)",
)


_AUTOCAST = {
    "torch.autocast(DEVICE, torch.bfloat16)": torch.bfloat16,
    "torch.autocast(DEVICE, torch.float16)": torch.float16,
    "torch.autocast(DEVICE, dtype=torch.bfloat16, cache_enabled=False)": torch.bfloat16,
    "torch.autocast(DEVICE, enabled=False)": None,
}
_OFFS = (
    "(torch.arange(1, {e} + 1) * {x}.shape[0] // {e}).to(torch.int32)",
    "(({x}.argmax(-1) % {e})[:, None] == torch.arange({e})).sum(0).cumsum(0).to(torch.int32)",
)


class _Writer:
    """Writes one program, running each line as it goes to know what is possible."""

    def __init__(self, seed: int, features: Collection[str]) -> None:
        self.seed, self.rng = seed, random.Random(seed)
        self.holder: Any = nn.Module()
        self.values: dict[str, Tensor] = {}
        self.others: dict[
            str, Tensor
        ] = {}  # the same, of inputs of other sizes, where the program is to take these too
        self.weights: list[str] = []
        self.shared: dict[tuple[int, int, torch.dtype], list[tuple[str, bool]]] = collections.defaultdict(list)
        self.inputs: list[str] = []
        self.lines: list[Line] = []
        self.traceable = True
        self.siblings, self.read = "freeze" in features, ""
        self.around, self.inside, self.left = (
            "",
            "",
            0,
        )  # the context managers, and how many more lines stand in the inner one
        self.regions = "autocast" in features and self.rng.random() < 0.1
        if "autocast" in features and self.rng.random() < 0.15:
            self.around = self.rng.choice([text for text, dtype in _AUTOCAST.items() if dtype is not None])
        self.sizes: dict[str, tuple[int, int]] = {}
        self.dynamic = "dynamic" in features and self.rng.random() < 0.25
        self.experts = "grouped" in features and self.rng.random() < 0.2

    @property
    def casts(self) -> torch.dtype | None:
        """What autocast casts to."""
        return _AUTOCAST[self.inside or self.around] if self.inside or self.around else None

    def weight(self, statement: str) -> None:
        exec(statement, {**NAMES, "self": self.holder})
        self.weights.append(statement)

    def registered(self, shape: str, dtype: torch.dtype, scale: float, parameter: bool = False) -> str:
        name, kind = f"w{len(self.weights)}", 0 if parameter else self.rng.random()
        if self.siblings and scale < 1 and self.rng.random() < 0.05:
            scale *= 0.01
        value = f"torch.randn({shape}, dtype={dtype}) * {scale:.2g}"
        if kind < 0.8:
            self.weight(f"self.{name} = nn.Parameter({value})")
        elif kind < 0.95 or self.dynamic:  # of another tensor Dynamo makes even the weight's sizes symbolic
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

    def dtype(self, value: Tensor) -> torch.dtype:
        """Of a weight that multiplies `value`."""
        if self.casts is not None and value.dtype != torch.float64 and self.rng.random() < 0.5:
            return self.rng.choice(DTYPES)
        return value.dtype

    def stack(self, x: str, value: Tensor) -> Line:
        """Rows of several experts, each times a weight of their own."""
        rng, k = self.rng, value.shape[-1]
        several = value.dim() == 3
        n, e = rng.choice((16, 32, 64, k, 24)), value.shape[0] if several else rng.choice((1, 2, 3, 4))
        ways = [way for way in EXPERTS if value.dim() in way.dims]
        way = rng.choice([way for way in ways if way.rewritten] if rng.random() < 0.8 else ways)
        dtype = self.dtype(value) if several else torch.bfloat16  # the one that torch traces a grouped matmul in
        place = rng.choice(EXPERT_PLACES if way.rewritten else EXPERT_PLACES[:1])
        registered = self.registered(place.shape.format(e=e, n=n, k=k), dtype, max(k, 1) ** -0.5, not way.rewritten)
        weight = place.view.format(p=registered, e=e, n=n, k=k)
        turn = rng.choice((".mT", ".transpose(-2, -1)", ".transpose(1, 2)", ".permute(0, 2, 1)"))
        texts = {
            "x": x,
            "k": k,
            "n": n,
            "e": e,
            "w": weight + turn * place.transposed,
            "v": weight + turn * (not place.transposed),
        }
        if "{o}" in way.written:
            rows = value.shape[0]
            ends = [*sorted(rng.randint(0, rows) for _ in range(e - 1)), rows]
            offs = _OFFS if self.sizes else (*_OFFS, f"torch.tensor({ends}, dtype=torch.int32)")
            texts["o"] = rng.choice(offs).format(x=x, e=e)
        written, hand = way.written.format(**texts), way.by_hand.format(**texts)
        result = self.casts if self.casts is not None and several and value.dtype != torch.float64 else value.dtype
        fits = result == torch.bfloat16 and k % 16 == n % 16 == 0 and 0 not in (e, k, n)
        return Line("y", written, hand, 1, 1) if way.rewritten and fits else Line("y", written, written, 1)

    def linear(self, x: str, value: Tensor) -> Line:
        rng, k = self.rng, value.shape[-1]
        several = value.dim() == 3 and value.shape[0] > 1
        if self.experts and (several or (value.dim() == 2 and value.dtype == torch.bfloat16)) and rng.random() < 0.5:
            return self.stack(x, value)
        n = rng.choice((*SIZES, k, k, k))
        ways = [way for way in WAYS if value.dim() in way.dims]
        if rng.random() < 0.8:
            ways = [way for way in ways if way.rewritten]
        if (
            self.casts is not None and n == 1 and value.numel() == k
        ):  # a pointwise product to tensordot, which autocast leaves alone
            ways = [way for way in ways if "tensordot" not in way.written]
        way = rng.choice(ways)
        dtype = self.dtype(value)
        if rng.random() < 0.2 and "mm" in way.by_hand:
            name = f"fc{len(self.weights)}"
            bias = rng.random() < 0.7
            self.weight(f"self.{name} = nn.Linear({k}, {n}, bias={bias}, dtype={dtype})")
            written = f"self.{name}({rng.choice(('', 'input='))}{x})"
            hand = f"mm({x}, self.{name}.weight.t()" + (f", bias=self.{name}.bias)" if bias else ")")
            rows, fits = 1, k > 0 and n > 0
        else:
            # Computed of other constants than parameters, it is one itself to symbolic_trace.
            weight, transposed = self.matrix(n, k, dtype, parameter=not way.rewritten)
            turn = rng.choice((".t()", ".T", ".mT", ".transpose(0, 1)"))
            texts = {"x": x, "k": k, "n": n, "w": weight + turn * transposed, "v": weight + turn * (not transposed)}
            if "{b}" in way.written:
                texts["b"] = self.registered(f"{n}", dtype, 1)
            if "{c}" in way.written:
                texts["c"] = self.registered(f"{value.shape[0]}, {n}", dtype, 1)
            written, rows, fits = way.written.format(**texts), way.rows, way.fits(k, n)
            if self.casts is not None and value.dtype != torch.float64 and "uncast" not in way.by_hand:  # an addend too
                texts |= {name: f"{texts[name]}.to({self.casts})" for name in "bc" if name in texts}
            hand = way.by_hand.format(**texts) if way.rewritten else written
        if hand == written or value.dtype == torch.float64 or not fits:
            return Line("y", written, written, rows)
        return Line("y", written, hand, rows, rows)

    def checkpointed(self, x: str, value: Tensor) -> Line:
        line = self.linear("t", value)
        self.traceable = False
        act = self.rng.choice(("F.gelu({})", "torch.tanh({})", "{}"))
        written, hand = (
            f"checkpoint(lambda t: {act.format(text)}, {x}, use_reentrant=False)"
            for text in (line.written, line.by_hand)
        )
        return replace(line, written=written, by_hand=hand)

    def candidate(self) -> Line:
        rng = self.rng
        known = list(self.values)
        x = rng.choice(known[-3:] if rng.random() < 0.7 else known)
        kind = rng.random()
        if self.siblings and self.read and rng.random() < 0.2:
            x, kind = self.read, 0.0
        value = self.values[x]
        if kind < 0.45 and value.dim() and value.is_floating_point():
            self.read = x
            return self.checkpointed(x, value) if rng.random() < 0.01 else self.linear(x, value)
        like = [y for y in known if y != x and self.values[y].shape == value.shape]
        texts: dict[str, Any] = {"x": x, "y": rng.choice(like or [x]), "k": value.shape[-1] if value.dim() else 1}
        texts["d"] = ", ".join(map(str, value.shape)) or "1"
        table = (
            _POINTWISE
            if kind < 0.65
            else _VIEWS
            if kind < 0.83
            else _PAIRS
            if kind < 0.9
            else _CASTS
            if kind < 0.94
            else _ACTS
        )
        text = rng.choice(table).format(**texts)
        if ".t_()" in text and (x.startswith("x") or sum(y is value for y in self.values.values()) > 1):
            text = f"{x}.neg_()"  # of an input, Dynamo does not take it
        if self.sizes and ".squeeze()" in text:
            text = f"{x}.contiguous()"  # of other sizes it would have other dimensions
        if table is _ACTS and any(
            stride == 0 and size > 1 for size, stride in zip(value.shape, value.stride(), strict=True)
        ):
            table, text = (
                _VIEWS,
                f"{x}.clone()",
            )  # expanded; where eager writes it all the same, as `x.copy_(x)`, torch.export does not
        return Line("" if table is _ACTS else "y", text, text)

    def add(self, line: Line) -> None:
        try:
            with torch.no_grad(), contextlib.ExitStack() as stack:
                for text in filter(None, (self.around, self.inside)):
                    stack.enter_context(eval(text, names()))
                scopes = [names() | values | {"self": self.holder} for values in (self.others, self.values)]
                found = [eval(line.written, scope) for scope in (scopes if self.sizes else scopes[1:])]
        except (RuntimeError, ValueError, IndexError, NotImplementedError, TypeError):
            return
        if any(
            not isinstance(y, Tensor) or y.numel() > 20_000 or y.dim() > 4 or y.dim() != found[0].dim() for y in found
        ):
            return
        if not line.name:
            self.lines.append(replace(line, inside=self.inside))
            return
        name = f"y{len(self.lines)}"
        hand = line.by_hand
        if line.rewritten and not hand.startswith("checkpoint"):
            strides = f"({line.written}).stride()" if self.sizes else found[-1].stride()
            hand = f"laid({hand}, {strides})"
        self.values[name], self.others[name] = found[-1], found[0]
        self.lines.append(replace(line, name=name, by_hand=hand, inside=self.inside))

    def shape(self, sizes: list[int]) -> str:
        """Of an input: its sizes or, but for the last, names of theirs."""
        if not self.dynamic:
            return ", ".join(map(str, [*(min(s, 9) for s in sizes[:-1]), sizes[-1]]))
        found: list[str] = []
        for size in sizes[:-1]:
            if self.sizes and self.rng.random() < 0.4:
                found.append(self.rng.choice(list(self.sizes)))
                continue
            found.append(f"n{len(self.sizes)}")
            first = max(min(size, 9), 2)
            self.sizes[found[-1]] = first, self.rng.choice([s for s in range(2, 10) if s != first])
        return ", ".join([*found, str(sizes[-1])])

    def input(self, name: str) -> None:
        rng = self.rng
        sizes = [rng.choice(SIZES) for _ in range(rng.choice((1, 2, 2, 2, 3, 3, 4)))]
        if rng.random() < 0.03:
            sizes[0] = 0
        if self.experts:
            sizes[-1] = rng.choice((16, 32, 64))
        text = rng.choice(_INPUTS if len(sizes) > 1 else _INPUTS[:2]).format(s=self.shape(sizes))
        dtype = torch.bfloat16 if self.experts and rng.random() < 0.7 else rng.choice(DTYPES)
        text += {torch.float32: "", torch.float16: ".half()", torch.bfloat16: ".bfloat16()"}[dtype]
        for i, values in enumerate((self.values, self.others)):
            values[name] = eval(text, names() | {size: both[i] for size, both in self.sizes.items()})
        self.inputs.append(text)

    def program(self) -> Program:
        rng = self.rng
        for i in range(rng.choice((1, 1, 2))):
            self.input(f"x{i}")
        for _ in range(rng.randint(3, 14)):
            if self.left == 0:
                self.inside = rng.choice(list(_AUTOCAST)) if self.regions and rng.random() < 0.3 else ""
                self.left = rng.randint(1, 4)
            self.left -= 1
            self.add(self.candidate())
        if not any(line.rows for line in self.lines):
            for x in list(self.values):
                if self.values[x].dim():
                    self.add(self.linear(x, self.values[x]))
        made = [name for name in self.values if name.startswith("y")] or ["x0"]
        outputs = tuple(dict.fromkeys([*rng.sample(made, min(len(made), rng.choice((0, 1, 1, 2)))), made[-1]]))
        traceable = self.traceable and not any(
            line.inside for line in self.lines
        )  # to symbolic_trace autocast is none of the graph
        sizes = {name: first for name, (first, _) in self.sizes.items()}
        return Program(
            self.seed,
            tuple(self.weights),
            tuple(self.inputs),
            tuple(self.lines),
            outputs,
            traceable,
            self.around,
            sizes,
        )


def write(seed: int, features: Collection[str] = FEATURES) -> Program:
    """The program of a seed that may have these features."""
    torch.manual_seed(seed)
    return _Writer(seed, features).program()
