"""FP8Weight: what torch's operators give of one, however a linear is written, and what is written to one."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fp8fx import FP8Weight
from fp8fx.errors import ConfigError, DTypeError, FreezeError, ShapeError
from fp8fx.ops import fp8_tensor
from fp8fx.recipes import quantize as arithmetic
from fp8fx.recipes.quantize import Quantized
from fp8fx.recipes.recipe import RECIPES
from tests.support.numbers import error as relative_error

N, K = 48, 64

recipes = pytest.mark.parametrize("recipe", sorted(RECIPES))


@pytest.fixture
def value() -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, K, generator=torch.Generator().manual_seed(1))


def op(recipe: str) -> Callable[..., Tensor]:
    return getattr(torch.ops.fp8fx, f"matmul_fp8_{recipe}")


FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "F.linear": F.linear,
    "F.linear in 3-D": lambda x, w: F.linear(x[None], w)[0],
    "@ T": lambda x, w: x @ w.T,
    "@ mT": lambda x, w: x @ w.mT,
    "matmul of a strided input": lambda x, w: torch.matmul(x.t().contiguous().t()[:, None], w.t())[:, 0],
    "mm": lambda x, w: torch.mm(x, w.transpose(0, 1)),
    "addmm": lambda x, w: torch.addmm(torch.zeros(N), x, w.t()),
    "addmm of a matrix": lambda x, w: torch.addmm(torch.zeros(6, N), x, w.t()),
    "einsum": lambda x, w: torch.einsum("mk,nk->mn", x, w),
    "bmm": lambda x, w: torch.bmm(x[None], w.t()[None])[0],
    "two halves": lambda x, w: torch.cat([F.linear(x, part) for part in w.chunk(2)], 1),
}


@recipes
@pytest.mark.parametrize("form", FORMS)
def test_a_linear_is_the_fp8_matmul_however_it_is_written(form: str, recipe: str, value: Tensor, x: Tensor) -> None:
    result = FORMS[form](x, FP8Weight(value, recipe))
    assert relative_error(result, op(recipe)(x, value.t())) < 1e-6
    assert relative_error(result, x @ value.t()) > 1e-3  # the input is quantized, too


@recipes
@pytest.mark.parametrize("form", FORMS)
def test_inference_mode_gives_the_same(form: str, recipe: str, value: Tensor, x: Tensor) -> None:
    weight = FP8Weight(value, recipe)
    with torch.inference_mode():
        result = FORMS[form](x, weight)
    assert torch.equal(result, FORMS[form](x, weight))


@recipes
@pytest.mark.parametrize("form", FORMS)
def test_dynamo_sees_a_result_of_the_same_kind(form: str, recipe: str, value: Tensor, x: Tensor) -> None:
    weight = FP8Weight(value, recipe)
    real = FORMS[form](x, weight)
    with FakeTensorMode() as mode:
        fake = FORMS[form](mode.from_tensor(x), mode.from_tensor(weight))
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


@recipes
def test_a_bias_is_added(recipe: str, value: Tensor, x: Tensor) -> None:
    bias = torch.randn(N)
    assert relative_error(F.linear(x, FP8Weight(value, recipe), bias), op(recipe)(x, value.t(), bias=bias)) < 1e-6


@recipes
def test_addmm_with_factors_reads_the_dequantized_values(recipe: str, value: Tensor, x: Tensor) -> None:
    weight = FP8Weight(value, recipe)
    bias = torch.randn(N)
    result = torch.addmm(bias, x, weight.t(), beta=2, alpha=3)
    assert torch.equal(result, torch.addmm(bias, x, weight.dequantize().t(), beta=2, alpha=3))


@recipes
def test_the_gradient_of_the_input(recipe: str, value: Tensor, x: Tensor) -> None:
    weight = FP8Weight(value, recipe)
    x = x.requires_grad_()
    grad = torch.randn(6, N)
    (expected,) = torch.autograd.grad(op(recipe)(x, weight.t()), x, grad)
    (given,) = torch.autograd.grad(F.linear(x, weight), x, grad)
    assert torch.equal(given, expected)
    assert 0 < relative_error(given, grad @ value) < 0.12


@recipes
def test_a_transposed_weight(recipe: str, value: Tensor, x: Tensor) -> None:
    weight = FP8Weight(value.t(), recipe, transposed=True)
    assert weight.shape == (K, N)
    assert weight.qdata.stride() == (1, K)
    assert torch.equal(x @ weight, F.linear(x, FP8Weight(value, recipe)))
    weight.copy_(2 * value.t())
    assert torch.equal(x @ weight, F.linear(x, FP8Weight(2 * value, recipe)))


@recipes
def test_experts(recipe: str) -> None:
    value = torch.randn(3, 32, K).bfloat16()
    x = torch.randn(9, K).bfloat16()
    offs = torch.tensor([2, 5, 9], dtype=torch.int32)
    weight = FP8Weight(value, recipe)
    expected = getattr(torch.ops.fp8fx, f"grouped_mm_fp8_{recipe}")(x, value.mT, offs)
    assert torch.equal(F.grouped_mm(x, weight.mT, offs=offs), expected)
    batch = x.view(3, 3, K)
    assert relative_error(torch.bmm(batch, weight.mT), batch.float() @ value.float().mT) < 0.06
    assert relative_error(F.linear(x, weight[1]), x.float() @ value[1].float().t()) < 0.06


def test_a_grouped_matmul_that_the_op_does_not_take_is_in_high_precision() -> None:
    """In float32, as transformers multiplies experts on a CPU."""
    weight = FP8Weight(torch.randn(2, 48, 64))
    x, offs = torch.randn(6, 64), torch.tensor([2, 6], dtype=torch.int32)
    expected = torch.cat([x[:2] @ weight.dequantize()[0].T, x[2:] @ weight.dequantize()[1].T])
    assert relative_error(F.grouped_mm(x, weight.mT, offs=offs), expected) < 1e-6


@recipes
@pytest.mark.parametrize("shape", [(65, 33), (1, 70), (3, 40, 33)])
def test_a_large_weight_is_quantized_some_rows_at_a_time(
    shape: tuple[int, ...], recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = torch.randn(shape) * torch.logspace(-2, 2, shape[-2])[:, None]
    at_once = FP8Weight(value, recipe)
    sizes = []

    def quantize(x: Tensor, *args: Any) -> Quantized:
        sizes.append(x.numel())
        return arithmetic.quantize(x, *args)

    monkeypatch.setattr(fp8_tensor, "_PIECE", 100)
    monkeypatch.setattr(fp8_tensor, "quantize", quantize)
    in_pieces = FP8Weight(value, recipe)
    assert torch.equal(in_pieces.qdata.view(torch.uint8), at_once.qdata.view(torch.uint8))
    assert torch.equal(in_pieces.scale, at_once.scale)
    row = value[0].numel() if value.dim() == 3 and recipe != "rowwise" else shape[-1]
    assert max(sizes) <= max(100, row)
    assert sum(sizes) == value.numel()


@recipes
def test_an_embedding_gathers_its_rows(recipe: str, value: Tensor) -> None:
    weight = FP8Weight(value, recipe)
    indices = torch.tensor([[3, 7], [0, 3]])
    assert torch.equal(F.embedding(indices, weight), weight.dequantize()[indices])


@recipes
def test_what_is_no_linear_reads_the_dequantized_values(recipe: str, value: Tensor) -> None:
    weight = FP8Weight(value, recipe)
    exact = weight.dequantize()
    assert relative_error(exact, value) < 0.05
    assert torch.equal(weight * 2, exact * 2)
    assert torch.equal(weight.norm(dim=1), exact.norm(dim=1))
    assert torch.equal(torch.cat([weight, weight]), torch.cat([exact, exact]))
    assert torch.equal(weight @ weight.t(), exact @ exact.t())
    assert torch.equal(F.linear(exact.double(), weight.double()), exact.double() @ exact.double().t())


# What is written.


def _load(weight: FP8Weight, value: Tensor) -> None:
    nn.Module.load_state_dict(_holder(weight), {"weight": value})


def _holder(weight: FP8Weight) -> nn.Module:
    holder = nn.Module()
    holder.register_parameter("weight", weight)
    return holder


def _step(weight: FP8Weight, value: Tensor) -> None:
    weight.grad = weight.dequantize() - value
    torch.optim.SGD([weight], lr=1).step()


WRITES: dict[str, Callable[[FP8Weight, Tensor], object]] = {
    "copy_": lambda w, value: w.copy_(value),
    "data.copy_": lambda w, value: w.data.copy_(value),
    "data =": lambda w, value: setattr(w, "data", value),
    "data +=": lambda w, value: w.data.add_(value - w.dequantize()),
    "mul_ and add_": lambda w, value: w.mul_(0).add_(value),
    "a transposed view": lambda w, value: w.t().copy_(value.t()),
    "detach": lambda w, value: w.detach().copy_(value),
    "load_state_dict": _load,
    "an optimizer": _step,
    "an FP8 weight": lambda w, value: w.copy_(FP8Weight(value, w.recipe)),
    "nn.init": lambda w, value: (nn.init.zeros_(w), w.add_(value)),
}


@recipes
@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_is_quantized(write: str, recipe: str, value: Tensor) -> None:
    weight = FP8Weight(value, recipe)
    new = 100 * torch.randn(N, K)
    with torch.no_grad():
        WRITES[write](weight, new)
    assert torch.equal(weight.dequantize(), FP8Weight(new, recipe).dequantize()) or write in ("data +=", "an optimizer")
    assert relative_error(weight.dequantize(), new) < 0.05


def test_a_part_or_codes_without_their_scale_are_not_written(value: Tensor) -> None:
    weight = FP8Weight(value)
    before = weight.dequantize()
    with torch.no_grad():
        with pytest.raises(FreezeError, match=r"a part \(4, 64\) of an FP8 weight was written to"):
            weight[:4].copy_(torch.zeros(4, K))
        with pytest.raises(FreezeError, match=r"values without their scale"):
            weight.copy_(weight.qdata)
        with pytest.raises(FreezeError, match="cannot be a view of its data and its scale"):
            weight.view(-1)
        with pytest.raises(FreezeError, match=r"was set to \(3, 3\)"):
            weight.data = torch.zeros(3, 3)
        with pytest.raises(FreezeError, match="no memory of its dtype"):
            weight.view(torch.int32)
    assert torch.equal(weight.dequantize(), before)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: FP8Weight(torch.zeros(4, 4).int()), DTypeError, "expected float32, float16 or bfloat16"),
        (lambda: FP8Weight(torch.zeros(4)), ShapeError, r"got \(4,\)"),
        (lambda: FP8Weight(torch.full((4, 4), torch.nan)), FreezeError, "inf or NaN"),
        (lambda: FP8Weight(FP8Weight(torch.randn(32, 32)).qdata.bfloat16()), FreezeError, "FP8 codes in place of"),
        (lambda: FP8Weight(torch.zeros(4, 4), "rowise"), ConfigError, "Did you mean 'rowwise'"),
        (lambda: FP8Weight(torch.zeros(4, 4), requires_grad=True), FreezeError, "was told to require grad"),
        (lambda: FP8Weight(torch.zeros(4, 4)).requires_grad_(), FreezeError, "was told to require grad"),
        (lambda: torch.ops.fp8fx.matmul_fp8_rowwise(torch.ones(2, 4), FP8Weight(torch.ones(4, 8))), FreezeError, "K"),
    ],
)
def test_bad_input(make: Callable[[], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make()


# It is a tensor as any.


@recipes
def test_copies_moves_and_casts(recipe: str, value: Tensor, x: Tensor) -> None:
    layer = nn.Linear(K, N).requires_grad_(False)
    layer.weight = FP8Weight(value, recipe)
    y = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.to("cpu"), layer.float()):
        assert type(other.weight) is FP8Weight
        assert isinstance(other.weight, nn.Parameter)
        assert torch.equal(other(x), y)
    half = copy.deepcopy(layer).half()
    assert half.weight.dtype == torch.float16
    assert torch.equal(half.weight.qdata.float(), layer.weight.qdata.float())
    assert torch.equal(half.weight.scale, layer.weight.scale)
    assert half.weight.scale.dtype == torch.float32
    assert relative_error(half(x.half()), y) < 0.02
    assert copy.deepcopy(layer).double().weight.dtype == torch.float64
    layer.share_memory()
    assert layer.weight.is_shared()
    away = copy.deepcopy(layer).to("meta")
    assert away.weight.device.type == "meta"
    back = away.to_empty(device="cpu")
    back.load_state_dict(layer.state_dict())
    assert torch.equal(back(x), y)


def test_a_copy_has_memory_of_its_own(value: Tensor) -> None:
    weight = FP8Weight(value)
    other = copy.deepcopy(weight)
    other.zero_()
    assert relative_error(weight.dequantize(), value) < 0.05


@recipes
def test_torch_save_with_weights_only(recipe: str, value: Tensor) -> None:
    weight = FP8Weight(value, recipe)
    file = io.BytesIO()
    torch.save({"weight": weight}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["weight"]
    assert type(loaded) is FP8Weight
    assert torch.equal(loaded.dequantize(), weight.dequantize())
    assert loaded.recipe == recipe
