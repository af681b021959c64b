"""The matmul ops with a weight that is FP8 already: the same bits, the gradients of the contract, errors, what torch
asks of an op."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from fp8fx.errors import ConfigError, DeviceError, DifferentiationError, DTypeError, ExecutorError, ShapeError
from fp8fx.ops.matmul import op
from tests.support.contract import (
    CASES,
    E4M3,
    E5M2,
    ROUNDING,
    A,
    B,
    cast,
    cast_blocks,
    dtypes,
    error,
    frozen_weight,
    ladder,
    recipes,
)


@recipes
@dtypes
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("leading", "k", "n", "bsz", "bsz2"), CASES, ids=str)
def test_a_frozen_weight_gives_the_same_bits(
    leading: tuple[int, ...], k: int, n: int, bsz: int, bsz2: int, with_bias: bool, dtype: torch.dtype, recipe: str
) -> None:
    a, b, bias = (
        torch.randn(*leading, k).to(dtype),
        torch.randn(n, k).to(dtype).t(),
        torch.randn(n).to(dtype) if with_bias else None,
    )
    out = op(recipe)(a, bsz=bsz, bsz2=bsz2, bias=bias, **frozen_weight(recipe, b))
    assert torch.equal(out, op(recipe)(a, b, bsz, bsz2, bias=bias))


def frozen_gradients(recipe: str, weight: Tensor, scale: Tensor, grad: Tensor, bsz2: int = -1) -> Tensor:
    """a's gradient by the contract, of the FP8 values: a scale a row of the weight is none of its columns, so rowwise
    stays exact."""
    values, grad = weight.double() * (scale.double().t() if scale.dim() else scale.double()), grad.double()
    if recipe == "rowwise":
        return grad @ values.T
    quantized = (
        cast(grad, E5M2)
        if recipe == "global"
        else cast_blocks(grad, E5M2, ladder(weight.shape[1]) if bsz2 == -1 else bsz2)
    )
    return quantized @ values.T


@recipes
@dtypes
@pytest.mark.parametrize(("leading", "k", "n", "bsz", "bsz2"), CASES, ids=str)
def test_gradients_with_a_frozen_weight_are_the_contract(
    leading: tuple[int, ...], k: int, n: int, bsz: int, bsz2: int, dtype: torch.dtype, recipe: str
) -> None:
    a, bias = torch.randn(*leading, k).to(dtype).requires_grad_(), torch.randn(n).to(dtype).requires_grad_()
    frozen = frozen_weight(recipe, torch.randn(k, n).to(dtype))
    out = op(recipe)(a, bsz=bsz, bsz2=bsz2, bias=bias, **frozen)
    grad = torch.randn_like(out)
    grad_a, grad_bias = torch.autograd.grad(out, (a, bias), grad)
    rows = grad.reshape(-1, n)
    expected = frozen_gradients(recipe, frozen["b"], frozen["b_scale"], rows, bsz2)
    assert (grad_a.dtype, grad_a.shape, grad_bias.dtype, grad_bias.shape) == (dtype, a.shape, dtype, bias.shape)
    assert error(grad_a.reshape(-1, k), expected) <= ROUNDING[dtype]
    assert error(grad_bias, rows.double().sum(0)) <= ROUNDING[dtype]


@recipes
def test_a_gradient_in_high_precision_reads_the_frozen_values(recipe: str) -> None:
    a, grad, frozen = (
        torch.randn(5, 100, requires_grad=True),
        torch.randn(5, 50),
        frozen_weight(recipe, torch.randn(100, 50)),
    )
    (value,) = torch.autograd.grad(op(recipe)(a, dgrad=False, **frozen), a, grad)
    assert error(value, frozen_gradients("rowwise", frozen["b"], frozen["b_scale"], grad)) <= ROUNDING[torch.float32]


@recipes
@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)], ids=["a", "bias", "neither"])
def test_only_the_gradients_asked_for(wanted: tuple[bool, bool], recipe: str) -> None:
    a, bias = (x.requires_grad_(need) for x, need in zip((torch.randn(5, 100), torch.randn(50)), wanted, strict=True))
    out = op(recipe)(a, bias=bias, **frozen_weight(recipe, torch.randn(100, 50)))
    assert out.requires_grad == any(wanted)
    if any(wanted):
        out.sum().backward()
    assert [x.grad is not None for x in (a, bias)] == list(wanted)


@recipes
def test_a_biass_gradient_unpacks_nothing_that_was_saved(recipe: str) -> None:
    bias = torch.randn(50, requires_grad=True)
    unpacked: list[Tensor] = []

    def unpack(x: Tensor) -> Tensor:
        unpacked.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack):
        op(recipe)(torch.randn(5, 100), bias=bias, **frozen_weight(recipe, torch.randn(100, 50))).sum().backward()
    assert bias.grad is not None
    assert torch.equal(bias.grad, torch.full((50,), 5.0))
    assert unpacked == []


@recipes
def test_the_frozen_weight_itself_is_all_that_is_saved(recipe: str) -> None:
    a, frozen = torch.randn(5, 100, requires_grad=True), frozen_weight(recipe, torch.randn(100, 50))
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.data_ptr()) or x, lambda x: x):  # type: ignore[func-returns-value]
        op(recipe)(a, **frozen)
    assert sorted(saved) == sorted(x.data_ptr() for x in frozen.values())


@recipes
@pytest.mark.parametrize("of", ["a", "grad"])
def test_a_gradient_through_a_frozen_weight_is_not_differentiated_again(of: str, recipe: str) -> None:
    a, frozen = torch.randn(5, 100, requires_grad=True), frozen_weight(recipe, torch.randn(100, 50))
    grad = torch.randn(5, 50, requires_grad=True)
    out = op(recipe)(torch.relu(a), **frozen)
    (first,) = torch.autograd.grad(out, a, grad if of == "grad" else 2 * out, create_graph=True)
    with pytest.raises(DifferentiationError, match=rf"a gradient of matmul_fp8_{recipe} was differentiated again"):
        torch.autograd.grad(first.square().sum(), a if of == "a" else grad)


FP8_B = torch.ones(100, 50).to(E4M3)
TENSOR_SCALE, ROW_SCALE = torch.ones(()), torch.ones(50, 1)
FROZEN_ERRORS: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (
        ConfigError,
        r"got weight_only=True and no b_scale; it is for a weight that is FP8 already",
        {"b": B, "weight_only": True},
    ),
    (
        ConfigError,
        r"got a b_scale and a forward in high precision; leave b_scale out, or forward=True",
        {"b_scale": TENSOR_SCALE, "forward": False},
    ),
    (
        DTypeError,
        r"got b of torch\.float32 with a b_scale; expected b as torch\.float8_e4m3fn",
        {"b": B, "b_scale": TENSOR_SCALE},
    ),
    (
        DTypeError,
        r"got b of torch\.float8_e5m2 with a b_scale; expected b as torch\.float8_e4m3fn",
        {"b": FP8_B.to(E5M2)},
    ),
    (DTypeError, r"got b_scale of torch\.float64; expected torch\.float32", {"b_scale": TENSOR_SCALE.double()}),
    (DTypeError, r"got b_scale of torch\.bfloat16; expected torch\.float32", {"b_scale": ROW_SCALE.bfloat16()}),
    (ShapeError, r"got b_scale \(50,\); expected \(.*\) for b \(100, 50\)", {"b_scale": torch.ones(50)}),
    (ShapeError, r"got b_scale \(1, 50\); expected \(.*\) for b \(100, 50\)", {"b_scale": torch.ones(1, 50)}),
    (ShapeError, r"got b_scale \(1, 1\); expected \(.*\) for b \(100, 50\)", {"b_scale": torch.ones(1, 1)}),
    (ShapeError, r"got b_scale \(50, 2\); expected \(.*\) for b \(100, 50\)", {"b_scale": torch.ones(50, 2)}),
    (DeviceError, r"got b on cpu and b_scale on meta; move one with \.to", {"b_scale": "meta"}),
    (DeviceError, r"got a on cpu and b on meta; move one with \.to", {"b": FP8_B.to("meta"), "b_scale": "meta"}),
    (ExecutorError, r"got a b_scale; executor 'bitsandbytes' keeps no FP8 weights", {"executor": "bitsandbytes"}),
    (ShapeError, r"a's last dimension 100 and b's first 50 must be equal", {"b": FP8_B.t()}),
    (ShapeError, r"got bias \(49,\) for b \(100, 50\); expected \(50,\)", {"bias": torch.ones(49)}),
    (DTypeError, r"got a of torch\.float8_e4m3fn; expected float32", {"a": A.to(E4M3)}),
    (DTypeError, r"got a of torch\.float64; expected float32", {"a": A.double()}),
    (
        DTypeError,
        r"got a of torch\.float32 and bias of torch\.float16; expected one dtype",
        {"bias": torch.ones(50).half()},
    ),
    (DTypeError, r"got b of torch\.float8_e4m3fn; expected float32", {"b_scale": None}),
]


@recipes
@pytest.mark.parametrize(
    ("kind", "message", "given"),
    FROZEN_ERRORS,
    ids=[f"{kind.__name__}-{i}" for i, (kind, *_) in enumerate(FROZEN_ERRORS)],
)
def test_errors_of_a_frozen_weight(kind: type[Exception], message: str, given: dict[str, Any], recipe: str) -> None:
    scale = ROW_SCALE if recipe == "rowwise" else TENSOR_SCALE
    arguments = {"a": A, "b": FP8_B, "b_scale": scale, **given}
    if given.get("b_scale") == "meta":
        arguments["b_scale"] = scale.to("meta")
    if "weight_only" in given:
        del arguments["b_scale"]
    with pytest.raises(kind, match=message) as caught:
        op(recipe)(**arguments)
    assert str(caught.value).startswith(f"matmul_fp8_{recipe} got ")


@pytest.mark.parametrize(
    ("recipe", "scale", "expected"),
    [
        ("global", torch.ones(49, 1), "() or (50, 1)"),
        ("rowwise", TENSOR_SCALE, "(50, 1)"),
        ("mixed", torch.ones(49, 1), "() or (50, 1)"),
    ],
)
def test_another_recipes_scale_is_refused(recipe: str, scale: Tensor, expected: str) -> None:
    with pytest.raises(ShapeError, match=rf"expected {re.escape(expected)} for b"):
        op(recipe)(A, FP8_B, b_scale=scale)


@dtypes
@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize("weight_only", [False, True])
def test_a_scale_per_tensor_may_be_spread_over_the_rows(weight_only: bool, rows: int, dtype: torch.dtype) -> None:
    a, grad = torch.randn(rows, 100).to(dtype).requires_grad_(), torch.randn(rows, 50).to(dtype)
    frozen = frozen_weight("mixed", torch.randn(100, 50))
    found = []
    for scale in (frozen["b_scale"], frozen["b_scale"].expand(50, 1).contiguous()):
        out = op("mixed")(a, frozen["b"], b_scale=scale, weight_only=weight_only)
        found.append((out, *torch.autograd.grad(out, a, grad)))
    assert frozen["b_scale"].shape == () and all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@recipes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_leaves_a_frozen_weight_alone(dtype: torch.dtype, recipe: str) -> None:
    a, bias, frozen = torch.randn(5, 100), torch.randn(50), frozen_weight(recipe, torch.randn(100, 50))
    with torch.autocast("cpu", dtype=dtype):
        out = op(recipe)(a, bias=bias, **frozen)
    assert torch.equal(out, op(recipe)(a.to(dtype), bias=bias.to(dtype), **frozen))


@recipes
@dtypes
@pytest.mark.parametrize("weight_only", [False, True])
@pytest.mark.parametrize(
    ("leading", "k", "n"), [((0,), 64, 48), ((2, 0), 64, 48), ((5,), 64, 0), ((5,), 0, 48), ((1,), 0, 48)], ids=str
)
def test_empty_operands_with_a_frozen_weight(
    leading: tuple[int, ...], k: int, n: int, weight_only: bool, dtype: torch.dtype, recipe: str
) -> None:
    scale = torch.ones(n, 1) if recipe == "rowwise" else torch.ones(())
    a, bias = torch.randn(*leading, k).to(dtype).requires_grad_(), torch.randn(n).to(dtype).requires_grad_()
    out = op(recipe)(a, torch.zeros(n, k).to(E4M3).t(), bias=bias, b_scale=scale, weight_only=weight_only)
    assert (out.dtype, out.shape) == (dtype, (*leading, n))
    assert torch.equal(out, bias.expand(*leading, n))
    grad_a, grad_bias = torch.autograd.grad(out, (a, bias), torch.ones_like(out))
    assert torch.equal(grad_a, torch.zeros_like(a))
    assert torch.equal(grad_bias, torch.full((n,), float(math.prod(leading)), dtype=dtype))


@pytest.mark.slow
@recipes
@pytest.mark.parametrize("weight_only", [False, True])
def test_opcheck_of_a_frozen_weight(weight_only: bool, recipe: str) -> None:
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for rows in (1, 3):
        a, bias = torch.randn(rows, 100, requires_grad=True), torch.randn(50, requires_grad=True)
        frozen = frozen_weight(recipe, torch.randn(100, 50))
        options = {"bias": bias, "b_scale": frozen["b_scale"], "weight_only": weight_only}
        assert torch.library.opcheck(op(recipe), (a, frozen["b"]), options, test_utils=checks) == dict.fromkeys(
            checks, "SUCCESS"
        )


@recipes
def test_a_frozen_weight_and_its_scale_are_neither_changed_nor_returned(recipe: str) -> None:
    frozen, bias = frozen_weight(recipe, torch.randn(100, 50)), torch.randn(50)
    for rows in (0, 1, 5):
        given = [torch.randn(rows, 100, requires_grad=True), *frozen.values(), bias]
        before, versions = [x.detach().float().clone() for x in given], [x._version for x in given]
        out = op(recipe)(given[0], bias=bias, weight_only=True, **frozen)
        out.sum().backward()
        assert [x._version for x in given] == versions
        assert all(torch.equal(x.float(), y) for x, y in zip(given, before, strict=True))
        assert out.untyped_storage()._cdata not in {x.untyped_storage()._cdata for x in given}


@recipes
def test_meta_tensors_with_a_frozen_weight_give_the_shape(recipe: str) -> None:
    frozen = {name: x.to("meta") for name, x in frozen_weight(recipe, torch.randn(100, 50)).items()}
    for rows in (1, 4):
        out = op(recipe)(torch.ones(rows, 100, device="meta"), weight_only=True, **frozen)
        assert (out.device.type, out.shape, out.dtype) == ("meta", (rows, 50), torch.float32)


@recipes
def test_a_result_of_two_dimensions_is_a_tensor_of_its_own(recipe: str) -> None:
    a, b, factor = torch.randn(4, 32), torch.randn(32, 16), torch.ones((), requires_grad=True)
    with torch.no_grad():
        product = op(recipe)(a, b)
    product.mul_(factor)  # of a view made in no_grad, autograd would refuse it
    assert product.requires_grad
    assert not op(recipe)(a, b.requires_grad_()).detach_().requires_grad
