"""expand: a fused call becomes the calls it is made of, which compute what it computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fp8fx
from fp8fx.passes.rewrite import expand
from fp8fx.recipes.quantize import sqnr
from tests.support.capture import Capture, after, ops

WIDTH, HEADS = 64, 4
PADDING = torch.tensor([[False] * 6 + [True] * 2, [False] * 8])
FULL_PADDING = torch.zeros(2, 8).masked_fill(PADDING, -torch.inf)

MODELS: dict[str, Any] = {
    "layer": lambda: nn.TransformerEncoderLayer(WIDTH, HEADS, 128, dropout=0.0, batch_first=True),
    "norm first, gelu": lambda: nn.TransformerEncoderLayer(
        WIDTH, HEADS, 128, 0.0, "gelu", batch_first=True, norm_first=True
    ),
    "decoder layer": lambda: nn.TransformerDecoderLayer(WIDTH, HEADS, 128, dropout=0.0, batch_first=True),
    "attention": lambda: nn.MultiheadAttention(WIDTH, HEADS, batch_first=True),
    "attention of other widths": lambda: nn.MultiheadAttention(WIDTH, HEADS, kdim=32, vdim=48, batch_first=True),
}
COUNTS = {"layer": 4, "norm first, gelu": 4, "decoder layer": 7, "attention": 2, "attention of other widths": 4}
MASKS: dict[str, dict[str, Tensor]] = {
    "no mask": {},
    "padding": {"src_key_padding_mask": PADDING},
    "a mask": {"src_mask": torch.triu(torch.ones(8, 8, dtype=torch.bool), 1)},
    "an added mask": {"src_mask": torch.triu(torch.full((8, 8), -torch.inf), 1)},
    "both": {"src_mask": torch.triu(torch.full((8, 8), -torch.inf), 1), "src_key_padding_mask": FULL_PADDING},
}


def inputs(name: str) -> tuple[Tensor, ...]:
    x, y = torch.randn(2, 8, WIDTH), torch.randn(2, 9, WIDTH)
    return {
        "decoder layer": (x, y),
        "attention": (x, x, x),
        "attention of other widths": (x, torch.randn(2, 9, 32), torch.randn(2, 9, 48)),
    }.get(name, (x,))


def first(y: Any) -> Tensor:
    found: Tensor = y[0] if isinstance(y, tuple) else y
    return found


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_every_linear_is_found(name: str, dynamic: bool, training: bool) -> None:
    model, args = MODELS[name]().train(training), inputs(name)
    with torch.set_grad_enabled(training):
        exact = first(model(*args))
        for recipe, low, high in (("global", 18, 60), ("mixed", 18, 60)):
            capture = Capture(fp8fx.Config(recipe=recipe))
            out = first(torch.compile(model, backend=capture, dynamic=dynamic)(*args))
            assert len(capture.only.report.rewritten) == COUNTS[name]
            assert {row.name.rpartition(".")[2] for row in capture.only.report.rewritten} <= {
                *("in_proj_weight", "weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
            }
            assert low < sqnr(exact, out) < high
            torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ["layer", "norm first, gelu"])
def test_the_fast_path_is_what_it_is_expanded_to(name: str, mask: str) -> None:
    model, (x,) = MODELS[name]().eval(), inputs(name)
    capture = Capture(fp8fx.Config(include=()))  # expanded, and nothing rewritten
    with torch.no_grad():
        out, exact = (
            torch.compile(model, backend=capture)(x, **MASKS[mask]),
            torch.compile(model, backend="eager")(x, **MASKS[mask]),
        )
    assert torch._transformer_encoder_layer_fwd in ops(capture.only.before.graph)
    assert ops(capture.only.after.graph)[torch.ops.aten.linear.default] == 4
    assert sqnr(exact, out) > 120


def test_multi_head_attention_is_exactly_what_it_is_expanded_to() -> None:
    model, args = MODELS["attention"](), inputs("attention")
    capture = Capture(fp8fx.Config(include=()))
    out, weights = torch.compile(model, backend=capture)(*args, key_padding_mask=PADDING)
    assert F.multi_head_attention_forward in ops(capture.only.before.graph)
    assert F.multi_head_attention_forward not in ops(capture.only.after.graph)
    expected = model(*args, key_padding_mask=PADDING)
    assert torch.equal(out, expected[0])
    assert torch.equal(weights, expected[1])


def test_an_exported_fast_path() -> None:
    model, x = MODELS["layer"]().eval(), torch.randn(2, 8, WIDTH)
    with torch.no_grad():
        exported = torch.export.export(model, (x,))
        new = fp8fx.convert(exported)
        assert len(new.meta["fp8fx_report"].rewritten) == 4
        assert 18 < sqnr(model(x), new(x)) < 60


def test_autocast_reaches_the_calls() -> None:
    model, args = MODELS["attention"](), inputs("attention")

    def call(*args: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return first(model(*args))

    out = torch.compile(call, backend=Capture(fp8fx.Config(include=())))(*args)
    assert (out.dtype, out.tolist()) == (torch.bfloat16, call(*args).tolist())


@pytest.mark.compiles
@pytest.mark.slow
def test_gradients_reach_every_parameter() -> None:
    model, args = MODELS["attention of other widths"](), inputs("attention of other widths")
    first(torch.compile(model, backend="fp8")(*args)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def traced(model: nn.Module) -> fx.GraphModule:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = model

        def forward(self, x: Tensor) -> Any:
            return self.inside(x)

    return fx.symbolic_trace(Around())


def test_what_symbolic_trace_does_not_look_into_is_said() -> None:
    (row,) = fp8fx.convert(traced(MODELS["layer"]())).meta["fp8fx_report"].rows
    assert (row.form, row.path) == ("TransformerEncoderLayer", "inside")
    assert row.reason == "symbolic_trace does not look inside; pass torch.export.export(model, args)"
    (row,) = fp8fx.convert(traced(nn.LSTM(8, 8))).meta["fp8fx_report"].rows
    assert row.form == "LSTM"


def calling_attention() -> fx.GraphModule:
    """A graph of F.multi_head_attention_forward whose input has no known shape."""
    model = MODELS["attention"]()
    graph = fx.Graph()
    x = graph.placeholder("x")
    weights = [graph.get_attr(name) for name in ("in_proj_weight", "in_proj_bias")]
    out = [graph.get_attr(name) for name in ("out_proj.weight", "out_proj.bias")]
    graph.output(
        graph.call_function(
            F.multi_head_attention_forward, (x, x, x, WIDTH, HEADS, *weights, None, None, False, 0.0, *out)
        )
    )
    return fx.GraphModule(model, graph)


def test_without_shapes_it_stays_and_the_report_says_why() -> None:
    gm = calling_attention()
    new = fp8fx.convert(gm)
    assert new.code == gm.code
    (row,) = new.meta["fp8fx_report"].rows
    assert (row.form, row.reason) == (
        "multi_head_attention_forward",
        "a fused call that hides its linears, of inputs whose shapes are not known",
    )


def test_a_result_taken_as_a_whole() -> None:
    gm, x = calling_attention(), torch.randn(8, 2, WIDTH)
    new = fp8fx.convert(gm, (x,))
    assert len(new.meta["fp8fx_report"].rewritten) == 2
    for found, expected in zip(new(x), gm(x), strict=True):
        assert 15 < sqnr(expected, found) < 60


def test_nothing_to_expand_changes_nothing() -> None:
    rewrite = after([expand], nn.Sequential(nn.Linear(8, 8)), (torch.randn(2, 8),))
    assert [(result.count, result.modified) for result in rewrite.results] == [(0, False)]


def test_profit_never_leaves_the_fused_call() -> None:
    gm, x = calling_attention(), torch.randn(8, 2, WIDTH)
    new = fp8fx.convert(gm, (x,), profit="never")
    assert new.code == gm.code
