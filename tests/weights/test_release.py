"""release and restore: weights that only FP8 reads are given up, whatever reads them still is kept, and they come
back."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import fp8fx
from fp8fx.errors import FreezeError
from fp8fx.weights.store import STORE
from tests.support.agreement import Lowered
from tests.support.freezing import Model, equal, error, frozen, state_of
from tests.support.frozen_models import Tied, compiled, is_released


class Siblings(nn.Module):
    """Two siblings and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(64, 64, bias=False), nn.Linear(64, 8, bias=False)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.q(x) + 1, self.k(x) + 1


@pytest.mark.compiles
def test_released_weights_are_gone_and_come_back() -> None:
    model, x = Model(), torch.randn(4, 64)
    call = compiled(model)
    exact, expected, state = model(x), call(x), state_of(model)
    weights = {"q.weight", "k.weight", "q.bias", "weight", "out.weight"}  # q's bias is merged with k's, which has none
    assert fp8fx.release(call) == sum(state[name].nbytes for name in weights)
    for name, parameter in model.named_parameters():
        assert (parameter.shape, parameter.dtype) == (state[name].shape, state[name].dtype)
        assert is_released(parameter) == (name in weights)
        assert parameter.untyped_storage().nbytes() <= (4 if name in weights else parameter.nbytes)
    assert torch.equal(call(x), expected)
    assert (
        error(call(torch.cat([x, x])), torch.cat([expected, expected])) < 0.05
    )  # another shape, compiled after the release
    for module in (model, model.q, call):
        with pytest.raises(FreezeError, match=r"weight.*nothing to save"):
            module.state_dict()
    with pytest.raises(FreezeError, match="nowhere to load to"):
        model.load_state_dict(state)
    assert fp8fx.release(call) == 0
    other = Model()
    fp8fx.refresh(call, other.state_dict())  # released as they are
    assert error(call(x), frozen(other)(x)) < 1e-5
    fp8fx.restore(call, state)
    assert equal(state_of(model), state)
    assert torch.equal(model(x), exact)
    assert torch.equal(call(x), expected)
    model.load_state_dict(other.state_dict())


class Seen(nn.Module):
    """Weights and biases of two siblings, each seen in some way."""

    def __init__(
        self, shape: tuple[int, ...], weight: Callable[[Tensor], Tensor], bias: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.weight, self.bias, self.weight2, self.bias2 = (
            nn.Parameter(torch.randn(shape), requires_grad=False) for shape in (shape, (48,)) * 2
        )
        self.of_weight, self.of_bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x, self.weight, self.bias) * self.linear(x, self.weight2, self.bias2)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, self.of_weight(weight), self.of_bias(bias))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "weight", "bias", "gone"),
    [
        *(
            ((48, 64), lambda w: w, bias, ("weight", "weight2"))
            for bias in (lambda b: b * 2, lambda b: 1 + b, lambda b: torch.mul(b, 2))
        ),
        ((64, 48), lambda w: w.T, lambda b: -b, ("weight", "weight2")),
        ((3, 16, 64), lambda w: w.flatten(0, 1), lambda b: b, ("weight", "bias", "weight2", "bias2")),
        (
            (3, 16, 64),
            lambda w: w.view(48, 64),
            lambda b: b,
            ("bias", "bias2"),
        ),  # no view of what a release leaves of it
    ],
)
def test_a_released_model_is_traced_once_more(shape: Any, weight: Any, bias: Any, gone: tuple[str, ...]) -> None:
    model, x = Seen(shape, weight, bias), torch.randn(4, 64)
    call = torch.compile(model, backend=Lowered(fp8fx.Config(freeze=True)), fullgraph=True)
    expected = call(x)
    fp8fx.release(model)
    assert tuple(name for name, p in model.named_parameters() if is_released(p)) == gone
    assert torch.equal(call(x), expected)


@pytest.mark.compiles
def test_what_a_compiled_graph_reads_is_kept() -> None:
    model, tokens = Tied(), torch.randint(48, (3, 5))
    call = compiled(model)
    expected = call(tokens)
    assert fp8fx.release(call) == model.twice.weight.nbytes
    assert bool(model.embed.weight.isfinite().all())
    assert torch.equal(call(tokens), expected)


@pytest.mark.compiles
def test_an_excluded_linear_is_kept() -> None:
    model, x = Model(), torch.randn(4, 64)
    call = compiled(model, exclude=["out"])
    call(x)
    fp8fx.release(call)
    assert bool(model.out.weight.isfinite().all())
    assert is_released(model.q.weight)


@pytest.mark.compiles
def test_a_weight_that_only_a_forgotten_graph_has_read_is_released() -> None:
    model, x = nn.Linear(64, 48, bias=False).requires_grad_(False), torch.randn(4, 64)
    with torch.no_grad():
        torch.compile(model, backend="fp8")(x)
        call = compiled(model)
        expected = call(x)
        assert fp8fx.release(call) == 0  # that graph is still there
        torch._dynamo.reset()
        call = compiled(model)
        assert torch.equal(call(x), expected)
        assert fp8fx.release(call) == 48 * 64 * 4
        assert torch.equal(call(x), expected)


@pytest.mark.compiles
@pytest.mark.parametrize("graph", ["converted", "compiled"])
def test_a_computed_bias_stays_the_model_s_own(graph: str) -> None:
    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = (
                nn.Parameter(torch.randn(48, 64), requires_grad=False),
                nn.Parameter(torch.zeros(6, 8)),
            )

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight, self.bias.view(-1))

    model, x = Viewed(), torch.randn(4, 64)
    call = frozen(model) if graph == "converted" else compiled(model)
    before = call(x)
    before.sum().backward()
    assert torch.equal(model.bias.grad, torch.full((6, 8), 4.0))
    with torch.no_grad():
        model.bias += 1
    torch.testing.assert_close(call(x), before + 1)


@pytest.mark.compiles
def test_a_graph_that_needs_a_released_weight_is_an_error() -> None:
    model, x = Model(), torch.randn(4, 64)
    call = compiled(model)
    call(x)
    fp8fx.release(call)
    with pytest.raises(BackendCompilerFailed, match=r"has been released, and a graph needs its value; fp8fx\.restore"):
        torch.compile(model, backend="fp8")(x)  # not frozen
    with pytest.raises(BackendCompilerFailed, match="has been released"):
        compiled(model, "rowwise")(x)


@pytest.mark.parametrize("changed", ["dtype", "shape"])
@pytest.mark.usefixtures("uncompiled")
def test_another_dtype_or_shape_after_freezing_is_an_error(changed: str) -> None:
    model, x = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 48)).requires_grad_(False), torch.randn(4, 64)
    call = compiled(model)
    call(x)
    if changed == "dtype":
        model.half()
    else:
        for y in (model[1].weight, model[1].bias):
            y.data = torch.randn(32, *y.shape[1:])
    now = r"float16\(48, 64\)" if changed == "dtype" else r"float32\(32, 64\)"
    message = r"1\.weight was frozen as float32\(48, 64\) and is now " + now
    before, held = state_of(model), [y.clone() for entry in STORE.entries(model.parameters()) for y in entry.buffers]
    with pytest.raises(BackendCompilerFailed, match=message) as caught:
        call(x.to(model[1].weight.dtype))
    assert isinstance(caught.value.inner_exception, FreezeError)
    for state in (None, {name: 2 * y for name, y in before.items()}):
        with pytest.raises(FreezeError, match=message):
            fp8fx.refresh(call, state)
        assert equal(state_of(model), before)
    assert all(map(torch.equal, held, (y for entry in STORE.entries(model.parameters()) for y in entry.buffers)))


@pytest.mark.usefixtures("uncompiled")
def test_a_model_made_and_served_in_inference_mode_is_restored_there() -> None:
    with torch.inference_mode():
        model, x = Model(), torch.randn(4, 64)
        state, call, exact = state_of(model), compiled(model), model(x)
        expected = call(x)
        fp8fx.release(call)
        fp8fx.restore(call, state)
        assert torch.equal(call(x), expected)
        assert torch.equal(model(x), exact)


@pytest.mark.usefixtures("uncompiled")
def test_what_was_merged_with_a_weight_that_is_gone_goes_when_another_takes_its_place() -> None:
    model, x = Siblings(), torch.randn(4, 64)
    call = compiled(model)
    for _ in range(3):
        call(x)
        assert len(STORE._entries[model.q.weight]) == 1
        model.k.weight = nn.Parameter(torch.randn(8, 64), requires_grad=False)
        gc.collect()


@pytest.mark.usefixtures("uncompiled")
def test_a_released_weight_comes_back_after_what_it_was_merged_with_has_gone() -> None:
    model, x = Siblings(), torch.randn(4, 64)
    state, call = state_of(model), compiled(model)
    call(x)
    fp8fx.release(call)
    model.q = nn.Linear(64, 64, bias=False).requires_grad_(False)
    fp8fx.restore(call, state)
    assert equal(state_of(model), state)
    assert all(error(out, exact) < 0.05 for out, exact in zip(call(x), model(x), strict=True))


@pytest.mark.usefixtures("uncompiled")
def test_a_restored_model_trains_and_is_released_again() -> None:
    model, x = Model().requires_grad_(), torch.randn(4, 64)
    state, call = state_of(model), compiled(model)
    with torch.no_grad():
        expected = call(x)
    for _ in range(2):
        assert fp8fx.release(call) == sum(
            state[name].nbytes for name in ("q.weight", "k.weight", "q.bias", "weight", "out.weight")
        )
        with torch.no_grad():
            assert torch.equal(call(x), expected)
        fp8fx.restore(call, state)
        assert equal(state_of(model), state)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = model(x).square().sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    optimizer.step()
    assert model(x).square().sum() != loss
    fp8fx.refresh(call)
    with torch.no_grad():
        assert torch.equal(call(x), frozen(model)(x))


@pytest.mark.usefixtures("uncompiled")
def test_a_model_released_and_restored_in_inference_mode_trains_outside_it() -> None:
    model, x = Model().requires_grad_(), torch.randn(4, 64)
    state, call = state_of(model), compiled(model)
    with torch.inference_mode():
        call(x)
        fp8fx.release(call)
        call(x)
        fp8fx.restore(call, state)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.usefixtures("uncompiled")
def test_a_weight_that_any_graph_reads_is_kept() -> None:
    model, x = Model(), torch.randn(4, 64)
    for call in (compiled(model), compiled(model, exclude="out")):
        call(x)
    fp8fx.release(model)
    assert is_released(model.q.weight)
    assert model.out.weight.isfinite().all()
    torch._dynamo.reset()
    other = Model()
    compiled(other)(x)
    torch.compile(other, backend="fp8")(x)
    assert fp8fx.release(other) == 0
    assert all(p.isfinite().all() for p in other.parameters())


@pytest.mark.usefixtures("uncompiled")
def test_two_linears_of_one_weight_are_released_once() -> None:
    model, x = (
        nn.Sequential(nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 64, bias=False)).requires_grad_(False),
        torch.randn(4, 64),
    )
    model[2].weight = model[0].weight
    state, call = state_of(model), compiled(model)
    expected = call(x)
    assert len(STORE.entries(model.parameters())) == 1
    assert fp8fx.release(call) == 64 * 64 * 4
    assert torch.equal(call(x), expected)
    for layer in (model[0], model[2]):
        with pytest.raises(FreezeError, match="weight: released, so there is nothing to save"):
            layer.state_dict()
        with pytest.raises(FreezeError, match="nowhere to load to"):
            layer.load_state_dict({"weight": state["0.weight"]})
    fp8fx.restore(call, state)
    assert model[2].weight is model[0].weight
    assert equal(state_of(model), state)


class Ways(nn.Module):
    """One weight written in several ways, all of one input, beside another's."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b, self.fc = (
            nn.Parameter(torch.randn(64, 64) / 8),
            nn.Parameter(torch.randn(64)),
            nn.Linear(64, 48),
        )
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        by_einsum = torch.einsum("bk,nk->bn", x, self.w)
        return (
            F.linear(x, self.w),
            torch.addmm(self.b, x, self.w.permute(1, 0)),
            x @ self.w.t().detach(),
            by_einsum,
            self.fc(x),
        )


@pytest.mark.usefixtures("uncompiled")
def test_a_weight_written_in_several_ways_is_held_once_before_and_after_its_release() -> None:
    model, x = Ways(), torch.randn(4, 64)
    call = compiled(model)
    expected = call(x)
    assert len(STORE.entries([model.w])) == 1
    fp8fx.release(call)
    for a, b in zip(call(x), expected, strict=True):
        assert torch.equal(a, b)
    call(x[:3])  # another graph
    assert len(STORE.entries([model.w])) == 1


@pytest.mark.usefixtures("uncompiled")
def test_only_what_is_really_freed_counts() -> None:
    flat, model, x = (
        torch.randn(2, 64, 64),
        nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)),
        torch.randn(4, 64),
    )
    for i in (0, 1):  # as flattened parameters have it
        model[2 * i].weight = nn.Parameter(flat[i])
    call = compiled(model.requires_grad_(False))
    call(x)
    assert fp8fx.release(call) <= flat.nbytes


@pytest.mark.usefixtures("uncompiled")
def test_a_weight_whose_memory_a_graph_reads_is_not_released() -> None:
    """Nothing would be freed: its bias lies there too, as flattened parameters have it."""
    flat, model, x = (
        torch.randn(64 * 65),
        nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)),
        torch.randn(4, 64),
    )
    model[0].weight, model[0].bias = (nn.Parameter(part) for part in (flat[64:].view(64, 64), flat[:64]))
    call = compiled(model.requires_grad_(False))
    expected = call(x)
    assert fp8fx.release(call) == 64 * 64 * 4
    assert [is_released(layer.weight) for layer in (model[0], model[2])] == [False, True]
    assert torch.equal(call(x), expected)


@pytest.mark.slow
@pytest.mark.usefixtures("uncompiled")
def test_a_released_model_goes_with_its_last_reference() -> None:
    def count() -> list[int]:
        memory = {one for graph in STORE._graphs for one in graph.memory if not one.expired()}
        return [len(held) for held in (STORE._entries, memory, STORE._amaxes, STORE.released)]

    gc.collect()
    before, x = count(), torch.randn(4, 64)
    model = Model()
    call = compiled(model)
    call(x)
    fp8fx.release(call)
    call(x)
    assert all(now > then for now, then in zip(count(), before, strict=True))
    del model, call
    gc.collect()
    assert count() == before
