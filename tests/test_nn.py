"""LinearFP8Mixed, LinearFP8Global and LinearFP8Rowwise in the place of nn.Linear."""

from __future__ import annotations

import copy
import io
import itertools

import pytest
import torch
from torch import nn

from fp8fx.errors import ConfigError, GraphError
from fp8fx.executors import registry
from fp8fx.nn import LinearFP8Global, LinearFP8Mixed, LinearFP8Rowwise
from fp8fx.ops.matmul import op

Module = type[LinearFP8Mixed] | type[LinearFP8Global] | type[LinearFP8Rowwise]

modules = pytest.mark.parametrize(
    "module", [LinearFP8Mixed, LinearFP8Global, LinearFP8Rowwise], ids=["mixed", "global", "rowwise"]
)
biases = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])


@modules
@biases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_the_op_bit_for_bit(dtype: torch.dtype, bias: bool, module: Module) -> None:
    linear = module(100, 50, bias, dtype=dtype)
    x = torch.randn(2, 3, 100, dtype=dtype, requires_grad=True)
    out = linear(x)
    expected = op(linear.recipe)(x, linear.weight.t(), bias=linear.bias)
    assert (out.shape, out.dtype) == ((2, 3, 50), dtype)
    assert torch.equal(out, expected)
    leaves = [x, *linear.parameters()]
    grad = torch.randn_like(out)
    for value, reference in zip(
        torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        assert value.any()
        assert torch.equal(value, reference)


def test_the_recipes() -> None:
    assert (LinearFP8Mixed.recipe, LinearFP8Global.recipe, LinearFP8Rowwise.recipe) == ("mixed", "global", "rowwise")
    x, linear = torch.randn(5, 100) * torch.logspace(-3, 3, 5)[:, None], nn.Linear(100, 50)
    results = [module.from_linear(linear)(x) for module in (LinearFP8Mixed, LinearFP8Global, LinearFP8Rowwise)]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(results, 2))


@modules
@biases
def test_it_approximates_nn_linear(bias: bool, module: Module) -> None:
    linear = nn.Linear(100, 50, bias)
    x = torch.randn(16, 100)
    out, expected = module.from_linear(linear)(x), linear(x)
    assert 1e-3 < (out - expected).norm() / expected.norm() < 0.05  # FP8's noise: some, but no more


@modules
@biases
def test_state_dict_is_nn_linears_both_ways(bias: bool, module: Module) -> None:
    ours, theirs = module(100, 50, bias), nn.Linear(100, 50, bias)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert torch.equal(ours.weight, theirs.weight)
    other = nn.Linear(100, 50, bias)
    other.load_state_dict(module(100, 50, bias).state_dict(), strict=True)
    assert not torch.equal(other.weight, theirs.weight)


@modules
@biases
@pytest.mark.parametrize("training", [True, False])
def test_from_linear_shares_the_parameters(training: bool, bias: bool, module: Module) -> None:
    linear = nn.Linear(100, 50, bias, dtype=torch.bfloat16).train(training)
    ours = module.from_linear(linear, executor="simulated")
    assert type(ours) is module
    assert isinstance(ours, nn.Linear)
    assert ours.weight is linear.weight
    assert ours.bias is linear.bias
    assert (ours.in_features, ours.out_features, ours.training, ours.executor) == (100, 50, training, "simulated")


@modules
def test_from_linear_refuses_anything_else(module: Module) -> None:
    with pytest.raises(GraphError, match=r"from_linear got a Conv1d; expected an nn\.Linear"):
        module.from_linear(nn.Conv1d(1, 1, 1))  # type: ignore[arg-type]


@modules
def test_a_wrong_executor_is_refused_when_built(module: Module) -> None:
    names = ", ".join(sorted(registry.names()))
    message = rf"unknown executor 'simulate'; expected one of {names}\. Did you mean 'simulated'\?"
    with pytest.raises(ConfigError, match=message):
        module(100, 50, executor="simulate")
    with pytest.raises(ConfigError, match=message):
        module.from_linear(nn.Linear(100, 50), executor="simulate")


@modules
def test_the_executor_reaches_the_op(module: Module) -> None:
    linear, x = module(100, 50, executor="bitsandbytes"), torch.randn(5, 100)
    out = linear(x)
    assert torch.equal(out, op(linear.recipe)(x, linear.weight.t(), bias=linear.bias, executor="bitsandbytes"))
    assert not torch.equal(out, op(linear.recipe)(x, linear.weight.t(), bias=linear.bias, executor="simulated"))


@modules
def test_constructor_arguments_are_nn_linears(module: Module) -> None:
    linear = module(100, 50, False, "cpu", torch.float16)
    assert linear.bias is None
    assert (linear.weight.shape, linear.weight.dtype, linear.weight.device.type) == ((50, 100), torch.float16, "cpu")
    torch.manual_seed(3)
    ours = module(100, 50)
    torch.manual_seed(3)
    theirs = nn.Linear(100, 50)
    assert torch.equal(ours.weight, theirs.weight)  # initialized alike
    assert torch.equal(ours.bias, theirs.bias)


@modules
def test_meta_device(module: Module) -> None:
    linear = module(100, 50, device="meta", dtype=torch.bfloat16)
    assert {p.device.type for p in linear.parameters()} == {"meta"}
    out = linear(torch.randn(2, 3, 100, device="meta", dtype=torch.bfloat16))
    assert (out.device.type, out.shape, out.dtype) == ("meta", (2, 3, 50), torch.bfloat16)
    materialized = linear.to_empty(device="cpu")
    materialized.load_state_dict(nn.Linear(100, 50, dtype=torch.bfloat16).state_dict())
    assert materialized(torch.randn(5, 100, dtype=torch.bfloat16)).isfinite().all()


@modules
def test_copies_and_pickles(module: Module) -> None:
    linear, x = module(100, 50, executor="simulated"), torch.randn(5, 100)
    file = io.BytesIO()
    torch.save(linear, file)
    file.seek(0)
    for copied in (copy.deepcopy(linear), torch.load(file, weights_only=False)):
        assert type(copied) is module
        assert copied.executor == "simulated"
        assert copied.weight is not linear.weight
        assert torch.equal(copied(x), linear(x))


@pytest.mark.parametrize(
    ("linear", "expected"),
    [
        (
            LinearFP8Mixed(100, 50),
            "in_features=100, out_features=50, bias=True, recipe=mixed, bsz=128, bsz2=64, executor=auto",
        ),
        (
            LinearFP8Global(5000, 512, False, executor="simulated"),
            "in_features=5000, out_features=512, bias=False, recipe=global, bsz=4096, bsz2=512, executor=simulated",
        ),
    ],
    ids=["mixed", "global"],
)
def test_repr(linear: nn.Linear, expected: str) -> None:
    assert repr(linear) == f"{type(linear).__name__}({expected})"


@modules
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_no_features(module: Module) -> None:
    linear = module(0, 50)
    assert "bsz2=64" in repr(linear)
    assert "bsz=" not in repr(linear)
    assert torch.equal(linear(torch.randn(5, 0)), linear.bias.expand(5, 50))


@modules
def test_it_trains(module: Module) -> None:
    x = torch.randn(64, 32)
    target = x @ torch.randn(32, 16)
    model = nn.Sequential(module(32, 64), nn.Tanh(), module(64, 16))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    losses = []
    for _ in range(30):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
