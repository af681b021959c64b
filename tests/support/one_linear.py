"""A program of one linear, written in one way, of a weight in one place."""

from __future__ import annotations

from typing import Any

import torch

from fp8fx.linears.form import Family, Form
from tests.support.programs import Line, Program
from tests.support.written import EXPERT_PLACES, PLACES, Place, Way

__all__ = ["of_form", "program"]

K, N, E = 70, 200, 4
EXPERT_K, EXPERT_N = 64, 48
_SHAPES = {1: "{k}", 2: "8, {k}", 3: "4, 2, {k}", 4: "2, 4, 2, {k}"}


def program(way: Way, place: Place, dims: int, turn: str, cast: str = "", experts: bool = False) -> Program:
    """One linear of one input."""
    k, n = (EXPERT_K, EXPERT_N) if experts else (K, N)
    sizes: dict[str, Any] = {"k": k, "n": n, "e": E}
    weight = place.view.format(p="self.w", **sizes) + cast
    texts = {"x": "x0", "b": "self.b", "c": "self.c", "o": "x1", **sizes}
    texts |= {"w": weight + turn * place.transposed, "v": weight + turn * (not place.transposed)}
    dtype = torch.bfloat16 if experts else torch.float32
    weights = (
        f"self.w = nn.Parameter(torch.randn({place.shape.format(**sizes)}, dtype={dtype}))",
        f"self.b = nn.Parameter(torch.randn({n}, dtype={dtype}){cast})",
        f"self.c = nn.Parameter(torch.randn(8, {n}, dtype={dtype}){cast})",
    )
    inputs = [f"torch.randn({_SHAPES[dims].format(**sizes)}, dtype={dtype}){cast}"]
    if experts:
        inputs.append("torch.tensor([1, 4, 4, 8], dtype=torch.int32)")
    line = Line("y", way.written.format(**texts), way.by_hand.format(**texts), way.rows, way.rows)
    return Program(0, weights, tuple(inputs), (line,), ("y",), True)


def of_form(form: Form) -> Program:
    """The example of a form; by hand the same in high precision."""
    way = Way(form.example, form.example, (form.example_dims,))
    if form.family is Family.GROUPED:
        return program(way, EXPERT_PLACES[0], form.example_dims, ".mT", experts=True)
    return program(way, PLACES[0], form.example_dims, ".t()")
