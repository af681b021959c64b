"""Convolutions of size 1 as linears of each pixel's channels, for those who ask for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fp8fx
from fp8fx.recipes.quantize import sqnr
from tests.support.capture import Capture

K, N = 70, 40
SIZES = {1: (9,), 2: (5, 7), 3: (3, 4, 5)}


class Model(nn.Module):
    def __init__(self, function: Callable[[Model, Tensor], Tensor] | None = None, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.conv = nn.Conv2d(K, N, 1, **options)
        self.w = nn.Parameter(torch.randn(N, K, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if self.function is None else self.function(self, x)


def by_hand(x: Tensor, weight: Tensor, bias: Tensor | None, recipe: str) -> Tensor:
    op = getattr(torch.ops.fp8fx, f"matmul_fp8_{recipe}")
    return op(x.movedim(1, -1), weight.flatten(1).t(), 128, 64, bias=bias).movedim(-1, 1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("recipe", ["mixed", "global", "rowwise"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dims", SIZES)
def test_every_dimension(dims: int, bias: bool, recipe: str) -> None:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](K, N, 1, bias=bias)
    x, capture = torch.randn(2, K, *SIZES[dims]), Capture(fp8fx.Config(recipe=recipe, convolutions=True))
    out, exact = torch.compile(conv, backend=capture)(x), conv(x)
    (row,) = capture.only.report.rows
    assert (row.form, row.reason, row.m, row.k, row.n) == (f"conv{dims}d", None, str(2 * x[0, 0].numel()), "70", "40")
    assert torch.equal(out, by_hand(x, conv.weight, conv.bias, recipe))
    assert out.stride() == exact.stride()
    assert 20 < sqnr(exact, out) < 60


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("source", ["symbolic_trace", "export", "dynamo"])
def test_every_tracer_and_layout(source: str, layout: torch.memory_format) -> None:
    model, x = Model(), torch.randn(2, K, 5, 7).to(memory_format=layout)
    if source == "dynamo":
        out = torch.compile(model, backend=Capture(fp8fx.Config(convolutions=True)))(x)
    else:
        gm: Any = fx.symbolic_trace(model) if source == "symbolic_trace" else torch.export.export(model, (x,))
        new = fp8fx.convert(gm, (x,) if source == "symbolic_trace" else None, convolutions=True)
        assert [row.name for row in new.meta["fp8fx_report"].rewritten] == ["conv.weight"]
        out = new(x)
    assert torch.equal(out, by_hand(x, model.conv.weight, model.conv.bias, "mixed"))
    assert out.is_contiguous(memory_format=layout)


def test_gradients() -> None:
    model, x = Model(), torch.randn(2, K, 5, 7, requires_grad=True)
    results = [
        torch.autograd.grad(call(x).square().sum(), (x, *model.conv.parameters()))
        for call in (model, fp8fx.convert(model, (x,), convolutions=True))
    ]
    assert all(15 < sqnr(exact, found) < 70 for exact, found in zip(*results, strict=True))


def test_frozen() -> None:
    model, x = Model().requires_grad_(False), torch.randn(2, K, 5, 7)
    frozen = fp8fx.convert(model, (x,), convolutions=True, freeze=True)
    assert torch.equal(frozen(x), fp8fx.convert(model, (x,), convolutions=True)(x))
    assert "conv.weight" not in frozen.state_dict()
    model.conv.weight.mul_(3)
    frozen.load_state_dict(model.state_dict())
    assert torch.equal(frozen(x), fp8fx.convert(model, (x,), convolutions=True)(x))


def test_only_for_those_who_ask() -> None:
    model, x = Model(), torch.randn(2, K, 5, 7)
    assert fp8fx.convert(model, (x,)).meta["fp8fx_report"].rows == ()
    assert fp8fx.convert(model, (x,), convolutions=True).meta["fp8fx_report"].rewritten


@pytest.mark.parametrize("options", [{"stride": 2}, {"padding": 1}], ids=str)
def test_more_than_a_pixel_at_a_time_is_no_linear(options: dict[str, int]) -> None:
    model, x = Model(**options), torch.randn(2, K, 5, 7)
    assert fp8fx.convert(model, (x,), convolutions=True).meta["fp8fx_report"].rows == ()


def test_a_result_that_nobody_reads() -> None:
    model, x = Model(lambda p, x: (F.conv2d(x, p.w), x)[1]), torch.randn(2, K, 5, 7)
    (row,) = fp8fx.convert(model, (x,), convolutions=True).meta["fp8fx_report"].rows
    assert (row.reason, row.m, row.k, row.n) == (None, "70", "70", "40")


def test_larger_kernels_and_groups_are_no_linears() -> None:
    for conv in (nn.Conv2d(K, N, 3), nn.Conv2d(K, 2 * K, 1, groups=2), nn.ConvTranspose2d(K, N, 1)):
        new = fp8fx.convert(nn.Sequential(conv), (torch.randn(2, K, 5, 7),), convolutions=True)
        assert new.meta["fp8fx_report"].rows == ()


UNKNOWN = "the input's shape is not known; pass example inputs"
COMPUTED = "the weight is computed, not a parameter, a buffer, a constant or a view of one"


@pytest.mark.parametrize(
    ("function", "shape", "reason"),
    [
        (lambda p, x: F.conv2d(x, 2 * p.w), (2, K, 5, 7), COMPUTED),
        (lambda p, x: F.conv2d(x, p.w), (K, 5, 7), "a convolution of a single image"),
        (lambda p, x: F.conv2d(x, p.w), None, UNKNOWN),
        (lambda p, x: F.conv2d(x, p.w.double()), (2, K, 5, 7), COMPUTED),
    ],
)
def test_refused(function: Callable[[Model, Tensor], Tensor], shape: tuple[int, ...] | None, reason: str) -> None:
    model = Model(function)
    x = None if shape is None else torch.randn(shape)
    if reason == COMPUTED and x is not None and "double" in function.__code__.co_names:
        x = x.double()
    gm = fx.symbolic_trace(model)
    new = fp8fx.convert(gm, None if x is None else (x,), convolutions=True)
    (row,) = new.meta["fp8fx_report"].rows
    assert row.reason == reason
    assert new.code == gm.code


def test_hooks() -> None:
    model, x = Model(), torch.randn(2, K, 5, 7)
    model.conv.register_forward_hook(lambda *_: None)
    (row,) = fp8fx.convert(fx.symbolic_trace(model), (x,), convolutions=True).meta["fp8fx_report"].rows
    assert row.reason == "the module has hooks"
