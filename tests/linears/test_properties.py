"""Any way to write a linear, with any view of a weight and any shape and layout of input: convert gives what the op
gives by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import fx

from fp8fx.config import Config
from fp8fx.convert import convert
from fp8fx.recipes.recipe import RECIPES
from tests.support.agreement import Bounded, run
from tests.support.programs import Line, Program
from tests.support.written import PLACES, WAYS, exact, same

_SOME = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
_LEADING = st.sampled_from((0, 1, 2, 3, 5))
_FEATURES = st.sampled_from((0, 1, 2, 3, 16, 17, 64, 65, 130))
_LAYOUTS = (
    "torch.randn({s})",
    "torch.randn({s}, 2)[..., 0]",
    "torch.randn({s}).mT.contiguous().mT",
    "torch.randn(2, {s})[1]",
)
_LAYOUTS += ("torch.randn({s})[..., :1].expand({s})",)
_CASTS = {
    torch.float32: (),
    torch.float16: (".half()", ".type(torch.float16)"),
    torch.bfloat16: (".to(torch.bfloat16)", ".bfloat16()"),
}


@st.composite
def programs(draw: Any) -> Program:
    """A module of one linear, on one input."""
    way, place, dtype = draw(st.sampled_from(WAYS)), draw(st.sampled_from(PLACES)), draw(st.sampled_from(tuple(_CASTS)))
    leading, k, n = (
        [draw(_LEADING) for _ in range(draw(st.sampled_from(way.dims)) - 1)],
        draw(_FEATURES),
        draw(_FEATURES),
    )
    layout, shape = draw(st.sampled_from(_LAYOUTS)), ", ".join(map(str, (*leading, k)))
    cast = draw(st.sampled_from(("", *_CASTS[dtype])))
    turn = draw(st.sampled_from((".t()", ".T", ".mT", ".transpose(0, 1)", ".permute(1, 0)")))
    assume(leading or ".mT" not in layout)
    weight = place.view.format(p="self.w", n=n, k=k) + cast
    texts = {"x": "x0", "k": k, "n": n, "b": "self.b", "c": "self.c"}
    texts |= {"w": weight + turn * place.transposed, "v": weight + turn * (not place.transposed)}
    weights = (
        f"self.w = nn.Parameter(torch.randn({place.shape.format(n=n, k=k)}, dtype={torch.float32 if cast else dtype}))",
        f"self.b = nn.Parameter(torch.randn({n}, dtype={dtype}))",
        f"self.c = nn.Parameter(torch.randn({leading[-1] if leading else 1}, {n}, dtype={dtype}))",
    )
    line = Line("y", way.written.format(**texts), way.by_hand.format(**texts), 1, int(way.fits(k, n)))
    return Program(0, weights, (f"{layout.format(s=shape)}.to({dtype})",), (line,), ("y",), True)


def laid_out(program: Program, stride: tuple[int, ...]) -> Program:
    """The same, where the result by hand lies in memory as it does as written."""
    (line,) = program.lines
    hand = f"laid({line.by_hand}, {stride})" if line.rewritten else line.written
    return Program(
        program.seed, program.weights, program.inputs, (Line("y", line.written, hand, 1, line.rewritten),), ("y",), True
    )


@pytest.mark.parametrize("recipe", RECIPES)
@settings(_SOME)  # as many as the profile says, tests/conftest.py
@given(program=programs(), traced=st.booleans(), grad=st.booleans())
def test_any_linear(recipe: str, program: Program, traced: bool, grad: bool) -> None:
    model = program.model()
    try:
        plain = run(program, model, model, grad)
    except (RuntimeError, IndexError):
        assume(False)  # empty operands that this form does not take
    program = laid_out(program, plain.strides[0])
    model, (line,) = program.model(), program.lines
    new = convert(
        fx.symbolic_trace(model) if traced else model, program.arguments(grad), Config(recipe=recipe, convolutions=True)
    )
    (row,) = new.meta["fp8fx_report"].rows
    assert (row.reason is None) == bool(line.rewritten), row.reason
    hand = run(program, lambda x: model.by_hand(Bounded(recipe), x), model, grad)
    found = run(program, new, model, grad)
    assert found.results.keys() == hand.results.keys()
    for name, value in found.results.items():
        assert same(hand.results[name], value), name
    if not line.rewritten:
        assert all(same(plain.results[name], value) for name, value in found.results.items())
    known = plain.results["output 0"]
    assert all(
        a == b
        for a, b, size in zip(found.strides[0], plain.strides[0], known.shape, strict=True)
        if size != 1 and known.numel()
    )
    # By hand, without FP8, it is the form itself.
    by_hand = run(program, lambda x: model.by_hand(exact, x), model, False).results["output 0"]
    tolerance = 8 * torch.finfo(known.dtype).eps
    torch.testing.assert_close(by_hand, known, rtol=tolerance, atol=tolerance * 40)
