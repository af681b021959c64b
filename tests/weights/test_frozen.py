"""Frozen weights from the user's side: what a converted and a compiled model hold, refresh, release, restore, and what is refused."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo import config as dynamo_config
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import fp8fx
from fp8fx.errors import DTypeError, FreezeError
from fp8fx.graph.values import attribute
from fp8fx.recipes.quantize import quantize, sqnr
from fp8fx.recipes.recipe import GLOBAL
from fp8fx.weights.store import STORE
from tests.support.agreement import Lowered
from tests.support.freezing import (
    Model,
    State,
    check_copies,
    check_files,
    check_moves,
    check_package,
    check_refresh,
    equal,
    error,
    frozen,
    saved,
    state_of,
)

recipes = pytest.mark.parametrize("recipe", ["mixed", "global", "rowwise"])


class Tied(nn.Module):
    """A head tied to the embedding, and one linear used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.twice = nn.Embedding(48, 64), nn.Linear(64, 64)
        self.head = nn.Linear(64, 48, bias=False)
        self.head.weight = self.embed.weight
        self.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.relu(self.twice(self.twice(self.embed(tokens)))))


class Siblings(nn.Module):
    """Two siblings and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(64, 64, bias=False), nn.Linear(64, 8, bias=False)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.q(x) + 1, self.k(x) + 1


def is_released(x: Tensor) -> bool:
    try:
        x.sum()
    except FreezeError:
        return True
    return False


def compiled(model: nn.Module, recipe: str = "global", **options: Any) -> Any:
    return torch.compile(model, backend="fp8", options={"recipe": recipe, "freeze": True, **options})


# Converted.


@recipes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_freezing_changes_no_bit_of_a_linear(recipe: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 100, bias=False)).to(dtype).requires_grad_(False)
    x = torch.randn(5, 64).to(dtype)
    gm = frozen(model, recipe)
    assert torch.equal(gm(x), fp8fx.convert(fx.symbolic_trace(model), recipe=recipe)(x))
    assert {y.dtype for name, y in gm.state_dict().items() if name.endswith("_fp8")} == {torch.float8_e4m3fn}


@recipes
def test_convert_leaves_the_model_alone_and_keeps_no_original(recipe: str) -> None:
    model, x = Model(), torch.randn(4, 64)
    before, expected = state_of(model), model(x)
    gm = frozen(model, recipe)
    assert error(gm(x), expected) < 0.05
    assert equal(state_of(model), before)
    assert torch.equal(model(x), expected)
    assert set(gm.state_dict()) == {
        *("norm.weight", "norm.bias", "bias", "out.bias", "q_bias_frozen"),
        *(f"{name}_{kind}" for name in ("q_weight", "weight", "out_weight") for kind in ("fp8", "scale")),
    }


def test_resident_bytes_are_half_of_bfloat16s() -> None:
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(4))).bfloat16().requires_grad_(False)
    gm = frozen(model)
    held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in [*gm.parameters(), *gm.buffers()]}
    assert sum(held.values()) <= 0.53 * sum(x.nbytes for x in model.parameters())


def test_a_tied_weight_stays_where_it_is_read_and_a_shared_one_is_frozen_once() -> None:
    model, tokens = Tied(), torch.randint(48, (3, 5))
    gm = frozen(model)
    assert {name for name in gm.state_dict() if "fp8" in name} == {"head_weight_fp8", "twice_weight_fp8"}
    assert torch.equal(gm.get_parameter("embed.weight"), model.embed.weight)
    assert "head.weight" not in gm.state_dict()
    assert error(gm(tokens), model(tokens)) < 0.06


@pytest.mark.parametrize(
    "make", [torch.export.export, lambda model, args: torch.export.export(model, args).module()], ids=["program", "module"]
)
def test_exported_programs_freeze(make: Callable[..., Any]) -> None:
    model, x = Model(), torch.randn(4, 64)
    gm = fp8fx.convert(make(model, (x,)), freeze=True, recipe="global")
    assert "q.weight" not in gm.state_dict()
    assert torch.equal(gm(x), frozen(model)(x))


@recipes
@pytest.mark.parametrize("check", [check_files, check_copies, check_refresh, check_moves])
def test_files_copies_refreshes_and_moves(check: Callable[[str, str], None], recipe: str) -> None:
    check("cpu", recipe)


COPIES: dict[str, Callable[[fx.GraphModule], fx.GraphModule]] = {
    "itself": lambda gm: gm,
    "deepcopy": copy.deepcopy,
    "torch.save": saved,
    "copies of copies": lambda gm: saved(copy.deepcopy(saved(copy.deepcopy(gm)))),
    "copy": copy.copy,  # shares the tensors, as of every module
}


@pytest.mark.parametrize(
    ("kind", "copied"),  # torch pickles nothing that torch.export made
    [("ep.module()", "deepcopy"), *((kind, way) for kind in ("nn.Module", "symbolic_trace") for way in list(COPIES)[1:-1])],
)
def test_a_whole_module_is_copied_and_pickled(kind: str, copied: str) -> None:
    model, x = Model(), torch.randn(4, 64)
    gm = fp8fx.convert(GRAPHS[kind](model, x), freeze=True)
    expected, other = gm(x), COPIES[copied](gm)
    assert torch.equal(other(x), expected)
    assert str(other.meta["fp8fx_report"]) == str(gm.meta["fp8fx_report"])
    fp8fx.refresh(other, {name: 2 * y for name, y in model.state_dict().items()})
    assert not torch.equal(other(x), expected)
    assert torch.equal(gm(x), expected)


@pytest.mark.parametrize("copied", ["itself", "deepcopy", "torch.save"])
def test_a_whole_module_is_exported(copied: str) -> None:
    x, gm = torch.randn(4, 64), COPIES[copied](frozen(Model()))
    expected = gm(x)
    program = torch.export.export(gm, (x,))
    assert torch.equal(program.module()(x), expected)
    assert torch.equal(program.run_decompositions().module()(x), expected)
    assert gm.to("meta")(x.to("meta")).shape == expected.shape


@pytest.mark.parametrize(("recipe", "rows", "dynamic"), [("mixed", (4,), False), ("global", (4, 2, 7), True), ("rowwise", (4, 1, 3), True)])
def test_an_aotinductor_package_runs_without_us(recipe: str, rows: tuple[int, ...], dynamic: bool, tmp_path: Path) -> None:
    check_package(tmp_path, "cpu", recipe, rows, dynamic)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("copied", COPIES)
def test_the_state_dict_of_the_model_before_is_refused_by_every_copy(copied: str, strict: bool) -> None:
    gm, x, new = COPIES[copied](frozen(Model())), torch.randn(4, 64), Model().state_dict()
    before, expected = state_of(gm), gm(x)
    for state in (new, new | before, {"k.weight": new["k.weight"]}):
        with pytest.raises(FreezeError, match=r"has k\.weight.*which this model holds frozen; fp8fx\.refresh"):
            gm.load_state_dict(state, strict=strict)
        assert equal(state_of(gm), before)
        assert torch.equal(gm(x), expected)
    other = frozen(Model())
    gm.load_state_dict(other.state_dict(), strict=strict)
    assert torch.equal(gm(x), other(x))


@pytest.mark.parametrize("strict", [True, False])
def test_a_weight_that_is_held_beside_what_was_frozen_of_it_is_not_loaded_alone(strict: bool) -> None:
    class Reused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(48, 64)), nn.Parameter(torch.randn(48))
            self.requires_grad_(False)

        def forward(self, tokens: Tensor) -> Tensor:
            return F.linear(F.embedding(tokens, self.weight), self.weight, self.bias)

    gm, other = frozen(Reused()), frozen(Reused())
    before, new = state_of(gm), other.state_dict()
    assert {"weight", "weight_fp8"} < new.keys()
    for state in (Reused().state_dict(), {"weight": new["weight"]}):
        with pytest.raises(FreezeError, match="has weight, which this model holds frozen"):
            gm.load_state_dict(state, strict=strict)
        assert equal(state_of(gm), before)
    gm.load_state_dict(new, strict=strict)
    assert equal(state_of(gm), new)


@pytest.mark.parametrize("strict", [True, False])
def test_a_tied_weight_is_refused_by_its_other_name(strict: bool) -> None:
    tokens, other = torch.randint(0, 48, (4, 8)), Tied().state_dict()
    gm = frozen(Tied())
    state, expected = state_of(gm), gm(tokens)
    with pytest.raises(FreezeError, match=r"embed\.weight, which this model holds frozen"):
        gm.load_state_dict({"embed.weight": other["embed.weight"]}, strict=strict)
    assert equal(state_of(gm), state)
    gm.load_state_dict(state)  # its own has what was frozen, too
    assert torch.equal(gm(tokens), expected)


def test_what_was_frozen_can_be_printed() -> None:
    """Siblings' biases are frozen as one, and no longer their modules'."""
    gm = frozen(Model())
    assert gm.get_submodule("q").bias is None
    assert "Linear(in_features=64, out_features=64" in repr(gm)


def test_half_of_a_frozen_model_is_an_error() -> None:
    gm = frozen(Model()).half()
    with pytest.raises(DTypeError, match=r"b of torch\.float16 with a b_scale; expected b as torch\.float8_e4m3fn"):
        gm(torch.randn(4, 64).half())


# Refused.


def test_weights_that_are_trained_are_refused_in_grad_mode_alone() -> None:
    model, x = Model().requires_grad_(), torch.randn(4, 64)
    with pytest.raises(FreezeError, match=r"requires grad in grad mode; freezing is for inference: use torch\.no_grad"):
        frozen(model)
    with pytest.raises(BackendCompilerFailed, match=r"requires grad in grad mode"):
        compiled(model)(x)
    with torch.no_grad():
        assert error(frozen(model)(x), model(x)) < 0.05
        assert error(compiled(model)(x), model(x)) < 0.05


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(value: float) -> None:
    model = Model()
    model.out.weight[0, 0] = value
    with pytest.raises(FreezeError, match=r"out\.weight: inf or NaN"):
        frozen(model)


def test_the_executor_that_keeps_no_fp8_is_refused() -> None:
    with pytest.raises(fp8fx.FP8Error, match="executor 'bitsandbytes' keeps no FP8 weights"):
        frozen(Model(), executor="bitsandbytes")(torch.randn(4, 64))


# Refresh.


def broken(state: State, how: str) -> State:
    changed = dict(state)
    if how == "lacks":
        del changed["k.weight"]
    elif how == "has besides":
        changed["extra"] = torch.zeros(1)
    elif how == "shape":
        changed["q.weight"] = torch.zeros(3, 3)
    elif how == "dtype":
        changed["norm.weight"] = changed["norm.weight"].half()
    else:
        changed["out.weight"] = torch.full_like(changed["out.weight"], torch.nan)
    return changed


MESSAGES = {
    "lacks": r"lacks k\.weight; .*nothing was changed",
    "has besides": r"has besides extra; .*nothing was changed",
    "shape": r"q\.weight is float32\(3, 3\) in the state dict; expected float32\(64, 64\), nothing was changed",
    "dtype": r"norm\.weight is float16\(64,\) in the state dict; expected float32\(64,\)",
    "NaN": r"out\.weight: inf or NaN",
}
every_way = pytest.mark.parametrize("how", MESSAGES)


@every_way
def test_a_bad_refresh_of_a_converted_model_changes_nothing(how: str) -> None:
    gm = frozen(Model())
    before = state_of(gm)
    with pytest.raises(FreezeError, match=MESSAGES[how]):
        fp8fx.refresh(gm, broken(state_of(Model()), how))
    assert equal(state_of(gm), before)


class Constants(nn.Module):
    """Weights of a tensor that no state dict has, and gathered by one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.constant = nn.Parameter(torch.randn(48, 64)), torch.randn(64, 32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x, self.weight[torch.arange(0, 48, 2)]), x.relu() @ self.constant


@pytest.mark.parametrize("copied", [lambda gm: gm, copy.deepcopy, lambda gm: copy.deepcopy(copy.deepcopy(gm))], ids=["", "copy", "copies"])
def test_constants_stay_when_a_converted_model_takes_new_weights(copied: Callable[..., Any]) -> None:
    model, x = Constants().requires_grad_(False), torch.randn(4, 64)
    gm = copied(fp8fx.convert(model, freeze=True))
    model.weight.mul_(3)
    fp8fx.refresh(gm, model.state_dict())
    for found, expected in zip(gm(x), fp8fx.convert(model)(x), strict=True):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)  # the weight lies otherwise in memory


def test_a_converted_model_has_nothing_to_refresh_from_itself() -> None:
    with pytest.raises(FreezeError, match="holds no original weights; pass the state dict"):
        fp8fx.refresh(frozen(Model()))


@pytest.mark.parametrize("call", [fp8fx.refresh, fp8fx.release], ids=["refresh", "release"])
def test_a_model_of_which_nothing_is_frozen(call: Callable[[Any], Any]) -> None:
    with pytest.raises(FreezeError, match="nothing of this model is frozen"):
        call(Model())
    with pytest.raises(fp8fx.errors.GraphError, match="got a int; expected the model"):
        call(3)


def test_a_compiled_model_is_frozen_until_it_is_refreshed() -> None:
    model, x = Model(), torch.randn(4, 64)
    counter = CompileCounterWithBackend("fp8")
    call, counted = compiled(model), torch.compile(model, backend=counter)
    first = call(x)
    counted(x)
    assert error(first, frozen(model)(x)) < 1e-5
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    stale, fresh = call(x), counted(x)
    assert error(stale, fresh) > 0.05  # the norm and the biases are seen, the frozen weights are not
    fp8fx.refresh(call)
    assert error(call(x), frozen(model)(x)) < 1e-5
    other = Model()
    fp8fx.refresh(model, other.state_dict())
    assert error(call(x), frozen(other)(x)) < 1e-5
    assert equal(state_of(model), state_of(other))


@every_way
def test_a_bad_refresh_of_a_compiled_model_changes_nothing(how: str) -> None:
    model, x = Model(), torch.randn(4, 64)
    call = compiled(model)
    expected, before = call(x), state_of(model)
    with pytest.raises(FreezeError, match=MESSAGES[how]):
        fp8fx.refresh(call, broken(state_of(Model()), how))
    assert equal(state_of(model), before)
    assert torch.equal(call(x), expected)


@torch.no_grad()
def test_a_weight_that_the_graph_itself_writes_is_not_frozen() -> None:
    class Decaying(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.state = nn.Linear(32, 16), nn.Linear(16, 16, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y = self.state(self.fc(x))
            self.state.weight.mul_(-0.5)
            return y

    model, x = Decaying(), torch.randn(4, 32)
    expected = fp8fx.convert(fx.symbolic_trace(copy.deepcopy(model)))
    compiled = torch.compile(model, backend="fp8", options={"freeze": True})
    for _ in range(3):
        torch.testing.assert_close(compiled(x), expected(x), rtol=1e-4, atol=1e-5)
    fp8fx.release(compiled)
    torch.testing.assert_close(compiled(x), expected(x), rtol=1e-4, atol=1e-5)
    assert is_released(model.fc.weight) and not is_released(model.state.weight)


class Pair(nn.Module):
    """Two siblings, of which one's weight may be a tensor that no state dict has."""

    def __init__(self, first: str) -> None:
        super().__init__()
        self.first = first
        self.weight, self.constant = nn.Parameter(torch.randn(64, 64), requires_grad=False), torch.randn(64, 64)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x @ getattr(self, name) for name in sorted(("weight", "constant"), key=lambda name: name != self.first)]


@pytest.mark.parametrize("first", ["weight", "constant"])
def test_a_constant_that_is_frozen_with_a_weight_stays_when_that_is_refreshed(first: str) -> None:
    model, x = Pair(first), torch.randn(4, 64)
    backend = fp8fx.Backend(fp8fx.Config(freeze=True, recipe="rowwise"))
    call = torch.compile(model, backend=backend)
    call(x)
    assert [row.remark[:8] for row in backend.reports[0].rewritten] == ["one GEMM", "one GEMM"]
    model.weight.mul_(-3)
    fp8fx.refresh(model)
    for found, expected in zip(call(x), fp8fx.convert(model, recipe="rowwise")(x), strict=True):
        assert error(found, expected) < 1e-5


@pytest.mark.parametrize("gone", ["q", "k"])
def test_a_sibling_that_was_replaced(gone: str) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = (nn.Linear(64, 64).requires_grad_(False) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.q(x), self.k(x)])

    model, x = Two(), torch.randn(4, 64)
    call = compiled(model)
    call(x)
    getattr(model, gone).weight = nn.Parameter(torch.randn(64, 64), requires_grad=False)
    gc.collect()
    call(x)
    for parameter in model.parameters():
        parameter.mul_(1.5)
    fp8fx.refresh(model)
    assert error(call(x), compiled(copy.deepcopy(model))(x)) < 1e-5


def test_refreshing_compiles_nothing() -> None:
    model, x = Model(), torch.randn(4, 64)
    backend = fp8fx.Backend(fp8fx.Config(freeze=True))
    call = torch.compile(model, backend=backend)
    for _ in range(3):
        call(x)
        fp8fx.refresh(call, Model().state_dict())
    assert len(backend.reports) == 1


# Release and restore.


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
    assert error(call(torch.cat([x, x])), torch.cat([expected, expected])) < 0.05  # another shape, compiled after the release
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

    def __init__(self, shape: tuple[int, ...], weight: Callable[[Tensor], Tensor], bias: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.bias, self.weight2, self.bias2 = (
            nn.Parameter(torch.randn(shape), requires_grad=False) for shape in (shape, (48,)) * 2
        )
        self.of_weight, self.of_bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x, self.weight, self.bias) * self.linear(x, self.weight2, self.bias2)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, self.of_weight(weight), self.of_bias(bias))


@pytest.mark.parametrize(
    ("shape", "weight", "bias", "gone"),
    [
        *(((48, 64), lambda w: w, bias, ("weight", "weight2")) for bias in (lambda b: b * 2, lambda b: 1 + b, lambda b: torch.mul(b, 2))),
        ((64, 48), lambda w: w.T, lambda b: -b, ("weight", "weight2")),
        ((3, 16, 64), lambda w: w.flatten(0, 1), lambda b: b, ("weight", "bias", "weight2", "bias2")),
        ((3, 16, 64), lambda w: w.view(48, 64), lambda b: b, ("bias", "bias2")),  # no view of what a release leaves of it
    ],
)
def test_a_released_model_is_traced_once_more(shape: Any, weight: Any, bias: Any, gone: tuple[str, ...]) -> None:
    model, x = Seen(shape, weight, bias), torch.randn(4, 64)
    call = torch.compile(model, backend=Lowered(fp8fx.Config(freeze=True)), fullgraph=True)
    expected = call(x)
    fp8fx.release(model)
    assert tuple(name for name, p in model.named_parameters() if is_released(p)) == gone
    assert torch.equal(call(x), expected)


def test_what_a_compiled_graph_reads_is_kept() -> None:
    model, tokens = Tied(), torch.randint(48, (3, 5))
    call = compiled(model)
    expected = call(tokens)
    assert fp8fx.release(call) == model.twice.weight.nbytes
    assert bool(model.embed.weight.isfinite().all())
    assert torch.equal(call(tokens), expected)


def test_an_excluded_linear_is_kept() -> None:
    model, x = Model(), torch.randn(4, 64)
    call = compiled(model, exclude=["out"])
    call(x)
    fp8fx.release(call)
    assert bool(model.out.weight.isfinite().all())
    assert is_released(model.q.weight)


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


@pytest.mark.parametrize("graph", ["converted", "compiled"])
def test_a_computed_bias_stays_the_model_s_own(graph: str) -> None:
    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(48, 64), requires_grad=False), nn.Parameter(torch.zeros(6, 8))

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


def test_graphs_share_what_is_frozen_and_it_goes_with_the_model() -> None:
    model = Model()
    call = compiled(model)
    call(torch.randn(4, 64))
    entries = STORE.entries(model.parameters())
    call(torch.randn(7, 64))
    assert STORE.entries(model.parameters()) == entries
    assert {one.frozen.sources for one in entries} == {("q.weight", "k.weight"), ("q.bias",), ("weight",), ("out.weight",)}
    before = len(STORE._entries)
    del model, call, entries
    torch._dynamo.reset()
    gc.collect()
    assert len(STORE._entries) <= before - 4


def test_two_models_and_two_recipes_in_one_process() -> None:
    x, models = torch.randn(4, 64), [Model(), Model()]
    calls = [compiled(model, recipe) for model in models for recipe in ("global", "rowwise")]
    results = [call(x) for call in calls]
    fp8fx.refresh(models[0], models[1].state_dict())
    again = [call(x) for call in calls]
    for i in (0, 1):
        assert error(again[i], results[i + 2]) < 1e-5
        assert torch.equal(again[i + 2], results[i + 2])


def test_autocast_freezes_what_the_op_would_have_cast() -> None:
    model, x = nn.Linear(64, 48).requires_grad_(False), torch.randn(5, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compiled(model)(x)
    (entry,) = STORE.entries(model.parameters())
    expected = quantize(model.weight.bfloat16(), GLOBAL.forward.rhs, 64) if GLOBAL.forward else None
    assert expected is not None
    assert torch.equal(entry.buffers[0].float(), expected.data.float())
    assert torch.equal(entry.buffers[1], torch.as_tensor(expected.scale))


@pytest.mark.parametrize("way", ["siblings", "parts"])
def test_autocast_to_another_dtype_than_the_weights(way: str) -> None:
    """It takes no part in what is done to weights before a call; to put float16 side by side it has no rule where it casts to bfloat16."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = (nn.Linear(64, 64, dtype=torch.float16).requires_grad_(False) for _ in range(2))

        def forward(self, x: Tensor) -> Any:
            if way == "siblings":
                return self.q(x), self.k(x)
            return F.linear(x, self.q.weight[:32]), F.linear(x, self.q.weight[32:])

    model, x = Two(), torch.randn(5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        gm = fp8fx.convert(model, (x,), freeze=True, recipe="rowwise")
        assert [row.remark[:12] for row in gm.meta["fp8fx_report"].rewritten] == ["one GEMM with"[:12]] * 2
        for found, expected in zip(gm(x), fp8fx.convert(model, (x,), recipe="rowwise")(x), strict=True):
            assert found.dtype == expected.dtype == torch.bfloat16
            assert error(found, expected) < 1e-2


def test_a_model_of_the_same_class_gets_its_own_weights() -> None:
    """Dynamo calls a graph with the parameters of another model of the same class."""
    x, models = torch.randn(4, 64), [Model(), Model()]
    for model in models:
        assert error(compiled(model)(x), frozen(model)(x)) < 1e-5


def test_more_blocks_than_dynamo_compiles_one_function_for() -> None:
    x, blocks = torch.randn(4, 64), [Model() for _ in range(10)]
    with dynamo_config.patch(fail_on_recompile_limit_hit=True), torch.no_grad():
        for block in blocks:
            block.compile(backend="fp8", options={"recipe": "global", "freeze": True})
        for block in blocks:
            assert error(block(x), frozen(block)(x)) < 1e-5


def test_functional_weights_freeze_too() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(48, 64), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, weight=self.w) + x @ self.w.t()

    model, x = Functional(), torch.randn(5, 64)
    gm = frozen(model, "rowwise")
    assert "w" not in gm.state_dict()
    assert torch.equal(gm(x), fp8fx.convert(fx.symbolic_trace(model), recipe="rowwise")(x))


# Converted: every way to write a linear, every kind of graph.

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


class Written(nn.Module):
    """Some weights and a function of them as its forward."""

    def __init__(self, function: Callable[[Written, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.fc = nn.Linear(40, 24)
        self.w, self.kn = nn.Parameter(torch.randn(24, 40) / 4), nn.Parameter(torch.randn(40, 24) / 4)
        self.b, self.c = nn.Parameter(torch.randn(24)), nn.Parameter(torch.randn(5, 24))
        self.register_buffer("buffer", torch.randn(24, 40))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


FORMS: dict[str, Callable[[Written, Tensor], Tensor]] = {
    "nn.Linear": lambda p, x: p.fc(x),
    "F.linear": lambda p, x: F.linear(x, p.w, p.b),
    "F.linear without a bias": lambda p, x: F.linear(x, p.w),
    "x @ w.t()": lambda p, x: x @ p.w.t(),
    "x @ w": lambda p, x: x @ p.kn,
    "addmm": lambda p, x: torch.addmm(p.b, x, p.kn),
    "addmm of w.t()": lambda p, x: torch.addmm(p.b, x, p.w.t()),
    "alpha and beta": lambda p, x: torch.addmm(p.b, x, p.kn, alpha=0.5, beta=2),
    "a matrix as addend": lambda p, x: torch.addmm(p.c, x, p.kn),
    "beta=0": lambda p, x: torch.addmm(p.c, x, p.w.t(), beta=0),
    "a view": lambda p, x: F.linear(x, p.w.chunk(2)[1]),
    "a buffer": lambda p, x: x @ p.buffer.t(),
}


@recipes
@dtypes
@pytest.mark.parametrize("form", FORMS)
def test_frozen_is_unfrozen_however_the_linear_is_written(form: str, dtype: torch.dtype, recipe: str) -> None:
    model, x = Written(FORMS[form]).to(dtype), torch.randn(5, 40).to(dtype)
    new, old = frozen(model, recipe), fp8fx.convert(fx.symbolic_trace(model), recipe=recipe)
    assert any(y.dtype == torch.float8_e4m3fn for y in new.state_dict().values())
    assert (new(x).dtype, new(x).shape) == (old(x).dtype, old(x).shape)
    if "kn" in FORMS[form].__code__.co_names:  # whose frozen layout is another, which BLAS may sum in another order
        assert error(new(x), old(x)) <= {torch.float32: 3e-7, torch.float16: 6e-4, torch.bfloat16: 5e-3}[dtype]
    else:
        assert torch.equal(new(x), old(x))


# Whatever is converted, and the state dict that it had.
GRAPHS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "nn.Module": lambda model, x: model,
    "symbolic_trace": lambda model, x: fx.symbolic_trace(model),
    "ExportedProgram": lambda model, x: torch.export.export(model, (x,)),
    "ep.module()": lambda model, x: torch.export.export(model, (x,)).module(),
    "decompositions": lambda model, x: torch.export.export(model, (x,)).run_decompositions(),
    "make_fx": lambda model, x: make_fx(model)(x),
}


@pytest.mark.parametrize("kind", GRAPHS)
@pytest.mark.parametrize("form", ["nn.Linear", "x @ w", "a view", "a buffer"])
def test_every_kind_of_graph_forgets_its_weight_and_takes_a_new_one(form: str, kind: str) -> None:
    x, models = torch.randn(5, 40), [Written(FORMS[form]) for _ in range(2)]
    for y in (*models[1].parameters(), *models[1].buffers()):
        y.mul_(3)
    graphs = [GRAPHS[kind](model, x) for model in models]
    expected, old = fp8fx.convert(graphs[1])(x), fp8fx.convert(graphs[0])(x)
    gm = fp8fx.convert(graphs[0], freeze=True)
    assert error(gm(x), old) < 1e-6
    read = {"nn.Linear": "fc.weight", "x @ w": "kn", "a view": "w", "a buffer": "buffer"}[form]
    weight: Any = attribute(models[0], read)
    resident = [*gm.parameters(), *gm.buffers(), *(y for y in gm.__dict__.values() if isinstance(y, Tensor))]
    assert weight.data_ptr() not in {y.data_ptr() for y in resident}
    state: Any = graphs[1].state_dict
    fp8fx.refresh(gm, state if isinstance(state, dict) else state())
    assert error(gm(x), expected) < 1e-6


class Shared(nn.Module):
    """One linear under two names, and in a container that is itself under two."""

    def __init__(self) -> None:
        super().__init__()
        self.a = self.b = nn.Linear(64, 64)
        self.first = self.second = nn.Sequential(nn.Linear(64, 64, bias=False), nn.LayerNorm(64))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.b(self.first(torch.relu(self.a(x))))))


def identities(model: nn.Module) -> list[Any]:
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    modules = list(model.named_modules(remove_duplicate=False))
    return [*((name, id(x), x._version) for name, x in tensors), *((name, id(m), sorted(m.__dict__)) for name, m in modules)]


@pytest.mark.parametrize("kind", ["nn.Module", "symbolic_trace", "ep.module()"])
def test_the_input_keeps_its_modules_and_tensors_even_where_they_are_shared(kind: str) -> None:
    model, x = Shared(), torch.randn(4, 64)
    graph = GRAPHS[kind](model, x)
    before, state, expected = identities(graph), state_of(graph), graph(x)
    gm = fp8fx.convert(graph, freeze=True)
    assert identities(graph) == before
    assert equal(state_of(graph), state)
    assert torch.equal(graph(x), expected)
    assert torch.equal(gm(x), fp8fx.convert(graph)(x))
    assert sum(y.numel() for y in gm.parameters() if y.dtype == torch.float8_e4m3fn) == 2 * 64 * 64
    assert not any(y.numel() == 64 * 64 and y.dtype == torch.float32 for y in (*gm.parameters(), *gm.buffers()))
    doubled = Shared()
    doubled.load_state_dict({name: 2 * y for name, y in model.state_dict().items()})
    fp8fx.refresh(gm, {name: 2 * y for name, y in graph.state_dict().items()})
    assert torch.equal(gm(x), fp8fx.convert(doubled)(x))


def test_a_tied_weight_takes_the_new_values_in_both_places() -> None:
    model, other, tokens = Tied(), Tied(), torch.randint(48, (3, 5))
    gm, call = frozen(model), compiled(model)
    call(tokens)
    for new in (gm, call):
        fp8fx.refresh(new, other.state_dict())
        assert error(new(tokens), frozen(other)(tokens)) < 1e-5
    assert torch.equal(gm.get_parameter("embed.weight"), other.embed.weight)


def test_what_was_left_out_is_frozen_later() -> None:
    x, model, other = torch.randn(4, 64), Model(), Model()
    part = frozen(model, exclude="out")
    whole = fp8fx.convert(part, freeze=True, recipe="global")
    assert torch.equal(whole(x), frozen(model)(x))
    fp8fx.refresh(whole, other.state_dict())
    assert torch.equal(whole(x), frozen(other)(x))


def test_a_model_converted_in_inference_mode_takes_new_weights_outside_it() -> None:
    x, other = torch.randn(4, 64), Model()
    with torch.inference_mode():
        gm = frozen(Model())
    fp8fx.refresh(gm, other.state_dict())
    assert torch.equal(gm(x), frozen(other)(x))


def test_the_executor_that_keeps_no_fp8_is_refused_before_the_weights_are_gone() -> None:
    with pytest.raises(fp8fx.FP8Error, match="executor 'bitsandbytes' keeps no FP8 weights"):
        frozen(Model(), executor="bitsandbytes")
    with pytest.raises(BackendCompilerFailed, match="executor 'bitsandbytes' keeps no FP8 weights"):
        compiled(Model(), executor="bitsandbytes")(torch.randn(4, 64))


def test_a_meta_model_takes_frozen_weights_from_a_file() -> None:
    model, x = Written(FORMS["nn.Linear"]), torch.randn(5, 40)
    gm = frozen(model)
    with torch.device("meta"):
        shell = frozen(Written(FORMS["nn.Linear"]))
    assert all(y.is_meta for y in shell.state_dict().values())
    shell.load_state_dict(gm.state_dict(), assign=True)
    assert torch.equal(shell(x), gm(x))


# Compiled: what Dynamo reuses, recompiles and runs as it is. The graphs run as the backend rewrote them: Inductor takes seconds.


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fp8fx.lowering.compile_fx", lambda gm, inputs, *inner, config_patches: gm.forward)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc(x))


class Breaking(nn.Module):
    """A graph for each layer."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(count))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            torch._dynamo.graph_break()
        return x


@pytest.mark.usefixtures("uncompiled")
def test_layers_compiled_one_by_one_or_between_graph_breaks_have_their_own_weights() -> None:
    x, whole, regional = torch.randn(4, 64), Breaking(), Breaking()
    call = compiled(whole)
    for layer in regional.layers:
        layer.compile(backend="fp8", options={"recipe": "global", "freeze": True})
    for model, run in ((whole, call), (regional, regional)):
        expected = x
        for layer in model.layers:
            expected = frozen(copy.deepcopy(layer))(expected) if model is whole else frozen(copy_of(layer))(expected)
        assert torch.equal(run(x), expected)


def copy_of(layer: Layer) -> Layer:
    """The layer without what compiled it."""
    new = Layer().requires_grad_(False)
    new.load_state_dict(layer.state_dict())
    return new


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("count", [3, 6])
def test_released_layers_compiled_one_by_one_never_run_on_nan(count: int) -> None:
    model, x = Breaking(count), torch.randn(4, 64)
    for layer in model.layers:
        layer.compile(backend="fp8", options={"recipe": "global", "freeze": True})
    expected = model(x)
    fp8fx.release(model)
    assert torch.equal(model(x), expected)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("how", ["attribute", "load_state_dict(assign=True)"])
def test_a_parameter_that_takes_anothers_place_is_seen(how: str) -> None:
    model, other, x = Model(), Model(), torch.randn(4, 64)
    call = compiled(model)
    call(x)
    if how == "attribute":
        model.out.weight = other.out.weight
    else:
        model.load_state_dict(other.state_dict(), assign=True)
        model.requires_grad_(False)
    assert torch.equal(call(x), frozen(model)(x))


@pytest.mark.usefixtures("uncompiled")
def test_a_graph_compiled_after_a_change_has_the_new_weights_and_then_so_have_all() -> None:
    model, x = Model(), torch.randn(4, 64)
    first = copy.deepcopy(model)
    call = torch.compile(model, backend="fp8", dynamic=False, options={"recipe": "global", "freeze": True})
    call(x)
    for weight in (model.q.weight, model.k.weight, model.weight, model.out.weight):
        weight.mul_(3)
    assert torch.equal(call(x), frozen(first)(x))  # a promise was broken
    assert torch.equal(call(x[:3]), frozen(model)(x[:3]))
    assert torch.equal(call(x), frozen(model)(x))
    for weight in (model.q.weight, model.k.weight, model.weight, model.out.weight):
        weight.mul_(3)
    fp8fx.refresh(call)
    for rows in (4, 3, 2):
        assert torch.equal(call(x[:rows]), frozen(model)(x[:rows]))


@pytest.mark.usefixtures("uncompiled")
def test_a_model_compiled_anew_has_the_weights_that_it_has_now_under_every_recipe() -> None:
    model, x = Model(), torch.randn(4, 64)
    compiled(model)(x)
    model.load_state_dict(Model().state_dict())
    torch._dynamo.reset()
    for recipe in ("global", "rowwise"):
        assert torch.equal(compiled(model, recipe)(x), frozen(model, recipe)(x))


def _scale_data(model: nn.Module) -> None:
    for p in model.parameters():
        p.data.mul_(-2)


def _set_data(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = -2 * p.data


def _from_a_vector(model: nn.Module) -> None:
    vector_to_parameters(-2 * parameters_to_vector(model.parameters()), model.parameters())


def _in_inference_mode(model: nn.Module) -> None:
    with torch.inference_mode():
        for p in model.parameters():
            p.mul_(-2)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("write", [_scale_data, _set_data, _from_a_vector, _in_inference_mode])
def test_a_graph_compiled_after_a_write_that_no_version_counts_has_the_new_weights(write: Callable[[nn.Module], None]) -> None:
    with torch.inference_mode(write is _in_inference_mode):
        model, x = Model(), torch.randn(4, 64)
        compiled(model)(x)
        versions = None if write is _in_inference_mode else [p._version for p in model.parameters()]
        write(model)
        assert versions is None or versions == [p._version for p in model.parameters()]
        torch._dynamo.reset()
        assert torch.equal(compiled(model)(x), frozen(model)(x))


@pytest.mark.usefixtures("uncompiled")
def test_many_blocks_through_one_function_are_compiled_one_by_one() -> None:
    def step(block: nn.Module, x: Tensor) -> Tensor:
        return block(x)

    blocks, x = [nn.Linear(64, 64).requires_grad_(False) for _ in range(12)], torch.randn(4, 64)
    call: Any = torch.compile(step, backend="fp8", options={"recipe": "global", "freeze": True}, fullgraph=True)
    for block in blocks:
        assert torch.equal(call(block, x), frozen(block)(x))


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
@pytest.mark.parametrize("how", ["converted", "compiled"])
@pytest.mark.parametrize("what", ["on the meta device", "sparse_coo"])
def test_a_refresh_with_values_that_cannot_be_copied_changes_nothing(what: str, how: str) -> None:
    model, x = Model(), torch.randn(4, 64)
    call = compiled(model) if how == "compiled" else frozen(model)
    expected, state = call(x), Model().state_dict()
    state["norm.weight"] = state["norm.weight"].to("meta") if what == "on the meta device" else state["norm.weight"].to_sparse()
    with pytest.raises(FreezeError, match=rf"norm\.weight is {what}.*; expected a dense tensor, nothing was changed"):
        fp8fx.refresh(call, state)
    assert torch.equal(call(x), expected)


@pytest.mark.usefixtures("uncompiled")
def test_two_layers_are_exchanged_by_a_refresh() -> None:
    model, x = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)).requires_grad_(False), torch.randn(4, 64)
    exchanged = nn.Sequential(model[1], model[0])
    expected, call = frozen(copy.deepcopy(exchanged))(x), compiled(model)
    call(x)
    fp8fx.refresh(call, {"0.weight": model[1].weight, "1.weight": model[0].weight})
    assert torch.equal(call(x), expected)
    assert torch.equal(frozen(model)(x), expected)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("given", ["model.pt", Model(), Model().named_parameters()], ids=lambda x: type(x).__name__)
def test_what_is_no_state_dict_is_said_to_be_none(given: Any) -> None:
    model = Model()
    call = compiled(model)
    call(torch.randn(4, 64))
    for function in (fp8fx.refresh, fp8fx.restore):
        with pytest.raises(FreezeError, match=f"the state dict is a {type(given).__name__}; expected a mapping of names to tensors"):
            function(call, given)


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
def test_trained_weights_are_refused_when_a_frozen_model_is_called_in_grad_mode() -> None:
    model, x = Model().requires_grad_(), torch.randn(4, 64)
    call = compiled(model)
    with torch.no_grad():
        call(x)
    with pytest.raises(BackendCompilerFailed, match="requires grad in grad mode") as caught:
        call(x)
    assert isinstance(caught.value.inner_exception, FreezeError)


@pytest.mark.usefixtures("uncompiled")
def test_a_compiled_function_or_submodule_is_refreshed_and_released_through_the_model() -> None:
    model, other, x = Model(), Model(), torch.randn(4, 64)
    call = torch.compile(lambda x: model(x), backend="fp8", options={"recipe": "global", "freeze": True})
    call(x)
    fp8fx.refresh(model, other.state_dict())
    assert torch.equal(call(x), frozen(other)(x))
    assert fp8fx.release(model) > 0
    assert torch.equal(call(x), frozen(other)(x))
    outer = nn.Sequential(nn.LayerNorm(64), other)
    outer[1] = compiled(other)  # type: ignore[assignment]
    expected = outer(x)
    fp8fx.refresh(outer, outer.state_dict())
    assert torch.equal(outer(x), expected)
    assert fp8fx.release(outer) > 0
    assert torch.equal(outer(x), expected)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", ["q", "k", "out"])  # q and k are one weight
def test_a_part_of_a_model_is_refreshed_by_itself_or_refused(name: str) -> None:
    model, x = Model(), torch.randn(4, 64)
    call = compiled(model)
    expected, before, part = call(x), state_of(model), model.get_submodule(name)
    new = {key: 2 * y for key, y in part.state_dict().items()}
    try:
        fp8fx.refresh(part, new)
    except FreezeError:
        assert equal(state_of(model), before)
        assert torch.equal(call(x), expected)
    else:
        assert equal(state_of(part), new)
        assert torch.equal(call(x), frozen(model)(x))


# State dicts.


class Extra(nn.Sequential):
    """A model whose state dict holds more than tensors."""

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 3}

    def set_extra_state(self, state: Any) -> None:
        assert state == {"version": 3}


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("kind", ["converted", "compiled"])
def test_the_models_own_state_dict_is_always_complete(kind: str) -> None:
    model, x = Extra(nn.Linear(64, 48), nn.BatchNorm1d(48), nn.Linear(48, 64)).requires_grad_(False).eval(), torch.randn(4, 64)
    new = fp8fx.convert(model, freeze=True) if kind == "converted" else compiled(model)
    expected = new(x)
    fp8fx.refresh(new, model.state_dict())
    assert torch.equal(new(x), expected)


@pytest.mark.usefixtures("uncompiled")
def test_the_state_dict_of_what_torch_compile_returned_is_the_models() -> None:
    model, other, x = Model(), Model(), torch.randn(4, 64)
    call = compiled(model)
    call(x)
    fp8fx.refresh(call, compiled(other).state_dict())
    assert torch.equal(call(x), frozen(other)(x))


WRONG: dict[str, Callable[[State], State]] = {
    "a shape that broadcasts": lambda s: {**s, "norm.weight": torch.ones(1)},
    "a transposed weight": lambda s: {**s, "k.weight": s["k.weight"].t()},
    "infinity in the last of two merged weights": lambda s: {**s, "k.weight": s["k.weight"] / 0},
    "NaN in the last weight": lambda s: {**s, "out.weight": s["out.weight"] * torch.nan},
    "float64": lambda s: {**s, "out.weight": s["out.weight"].double()},
    "no tensor": lambda s: {**s, "q.weight": s["q.weight"].tolist()},  # type: ignore[dict-item]
    "nothing": lambda s: {},
    "all names prefixed": lambda s: {f"model.{name}": x for name, x in s.items()},
}


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("released", [False, True], ids=["", "released"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_state_dict_changes_neither_parameters_nor_frozen_tensors(wrong: str, released: bool) -> None:
    model, x = Model(), torch.randn(4, 64)
    state, call, gm = WRONG[wrong]({name: 2 * y for name, y in Model().state_dict().items()}), compiled(model), frozen(model)
    expected = call(x)
    if released:
        assert fp8fx.release(call) > 0

    def everything() -> State:
        named = {name: y for name, y in (*model.named_parameters(), *model.named_buffers()) if not is_released(y)}
        own = {f"own {name}": y.clone() for name, y in named.items()}
        held = [buffer for entry in STORE.entries(model.parameters()) for buffer in entry.buffers]
        return own | {f"held {i}": y.clone() for i, y in enumerate(held)} | {f"gm {name}": y for name, y in state_of(gm).items()}

    before = everything()
    assert sum(name.startswith("held") for name in before) == 7  # three weights with their scales, and a bias
    for act in (lambda: fp8fx.refresh(call, state), lambda: fp8fx.restore(call, state), lambda: fp8fx.refresh(gm, state)):
        with pytest.raises(FreezeError):
            act()
        assert equal(everything(), before)
    assert torch.equal(call(x), expected)
    if released:
        with pytest.raises(FreezeError, match="nothing to save"):
            model.state_dict()


# Release and restore.


@pytest.mark.usefixtures("uncompiled")
def test_a_restored_model_trains_and_is_released_again() -> None:
    model, x = Model().requires_grad_(), torch.randn(4, 64)
    state, call = state_of(model), compiled(model)
    with torch.no_grad():
        expected = call(x)
    for _ in range(2):
        assert fp8fx.release(call) == sum(state[name].nbytes for name in ("q.weight", "k.weight", "q.bias", "weight", "out.weight"))
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
        self.w, self.b, self.fc = nn.Parameter(torch.randn(64, 64) / 8), nn.Parameter(torch.randn(64)), nn.Linear(64, 48)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        by_einsum = torch.einsum("bk,nk->bn", x, self.w)
        return F.linear(x, self.w), torch.addmm(self.b, x, self.w.permute(1, 0)), x @ self.w.t().detach(), by_einsum, self.fc(x)


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
    flat, model, x = torch.randn(2, 64, 64), nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), torch.randn(4, 64)
    for i in (0, 1):  # as flattened parameters have it
        model[2 * i].weight = nn.Parameter(flat[i])
    call = compiled(model.requires_grad_(False))
    call(x)
    assert fp8fx.release(call) <= flat.nbytes


@pytest.mark.usefixtures("uncompiled")
def test_a_weight_whose_memory_a_graph_reads_is_not_released() -> None:
    """Nothing would be freed: its bias lies there too, as flattened parameters have it."""
    flat, model, x = torch.randn(64 * 65), nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), torch.randn(4, 64)
    model[0].weight, model[0].bias = (nn.Parameter(part) for part in (flat[64:].view(64, 64), flat[:64]))
    call = compiled(model.requires_grad_(False))
    expected = call(x)
    assert fp8fx.release(call) == 64 * 64 * 4
    assert [is_released(layer.weight) for layer in (model[0], model[2])] == [False, True]
    assert torch.equal(call(x), expected)


@pytest.fixture
def swapping() -> Iterator[None]:
    """Modules swap their parameters' contents where they are moved, cast and loaded, which torch refuses of one with a weak reference."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


@pytest.mark.usefixtures("uncompiled", "swapping")
@pytest.mark.parametrize("trained", [False, True])
def test_a_compiled_model_swaps_its_parameters(trained: bool) -> None:
    model, x = Model().requires_grad_(trained), torch.randn(4, 64)
    call, other = torch.compile(model, backend="fp8", options={"recipe": "global"}), Model()
    with torch.set_grad_enabled(trained):
        call(x)
        model.load_state_dict(other.state_dict())
        assert torch.equal(call(x), fp8fx.convert(other, recipe="global")(x))
        model.bfloat16()
        assert torch.equal(call(x.bfloat16()), fp8fx.convert(other.bfloat16(), recipe="global")(x.bfloat16()))


@pytest.mark.usefixtures("uncompiled", "swapping")
def test_a_frozen_weight_is_not_swapped() -> None:
    """Dynamo's own guard on its identity holds a weak reference, too."""
    model, x = nn.Linear(64, 48, bias=False).requires_grad_(False), torch.randn(4, 64)
    call, before = compiled(model), model.weight.clone()
    expected = call(x)
    with pytest.raises(RuntimeError, match="Couldn't swap"):
        model.bfloat16()
    assert torch.equal(model.weight, before)
    assert torch.equal(call(x), expected)
    with pytest.raises(RuntimeError, match="While swapping the parameter"):
        model.load_state_dict(nn.Linear(64, 48, bias=False).state_dict())


@pytest.mark.usefixtures("uncompiled")
def test_a_model_around_a_released_one_is_not_saved_either() -> None:
    model, x = Model(), torch.randn(4, 64)
    call = compiled(model)
    call(x)
    fp8fx.release(call)
    outer = nn.Sequential(nn.LayerNorm(64), model)
    with pytest.raises(FreezeError, match=r"1\.\w+.*nothing to save"):
        outer.state_dict()
    with pytest.raises(FreezeError, match="nowhere to load to"):
        outer.load_state_dict(nn.Sequential(nn.LayerNorm(64), Model()).state_dict())
    assert model.norm.state_dict().keys() == {"weight", "bias"}  # nothing of it is released


READS: dict[str, Callable[[Model], object]] = {
    "a call": lambda m: m(torch.randn(4, 64)),
    "a function": lambda m: F.linear(torch.randn(4, 64), m.q.weight),
    "an operator": lambda m: torch.randn(4, 64) @ m.q.weight.T,
    "its data": lambda m: m.q.weight.data,
    "a cast": lambda m: m.q.half(),
    "a device": lambda m: m.q.to("meta"),
    "a copy": copy.deepcopy,
    "a pickle": lambda m: torch.save(m.q, io.BytesIO()),
    "its values": lambda m: m.q.weight.tolist(),
    "a change": lambda m: m.q.weight.zero_(),
    "a state dict with its parameters": lambda m: m.state_dict(keep_vars=True),
}


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("read", READS)
@torch.no_grad()
def test_whoever_reads_a_released_weight_gets_an_error(read: str) -> None:
    model, x = Model(), torch.randn(4, 64)
    call = compiled(model)
    expected = call(x)
    fp8fx.release(call)
    with pytest.raises(FreezeError, match=r"released.*fp8fx\.restore"):
        READS[read](model)
    assert torch.equal(call(x), expected)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("strict", [False, True])
def test_a_released_model_is_not_exported(strict: bool) -> None:
    model, x = Model(), torch.randn(4, 64)
    call = compiled(model)
    expected, state = call(x), state_of(model)
    fp8fx.release(call)
    for exported in (model, call):
        with pytest.raises(FreezeError, match=r"released is (exported|read by _is_view)"):
            torch.export.export(exported, (x,), strict=strict)
    assert torch.equal(call(x), expected)
    fp8fx.restore(call, state)
    assert torch.export.export(model, (x,), strict=strict).module()(x).isfinite().all()


@pytest.mark.usefixtures("uncompiled")
def test_a_released_weight_tells_what_it_was() -> None:
    model, x = Model(), torch.randn(4, 64)
    call, weight = compiled(model), model.q.weight
    call(x)
    fp8fx.release(call)
    assert (weight.shape, weight.size(0), weight.numel(), weight.dim(), len(weight)) == ((64, 64), 64, 4096, 2, 64)
    assert (weight.dtype, weight.device.type, weight.requires_grad) == (torch.float32, "cpu", False)
    assert weight.is_floating_point()
    assert isinstance(weight, nn.Parameter)
    assert weight in set(model.parameters())
    assert repr(weight) == "released float32(64, 64)"
    weight.requires_grad, weight.grad = False, None
    model.eval().requires_grad_(False)


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


def test_explain_freezes_nothing() -> None:
    model, x = Tied(), torch.randint(48, (3, 5))
    fp8fx.Backend(fp8fx.Config(freeze=True)).explain(model, x)
    assert STORE.entries(model.parameters()) == []
    with pytest.raises(FreezeError, match="nothing of this model is frozen"):
        fp8fx.release(model)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("how", ["many shapes", "a function of the layer"])
def test_where_dynamo_gives_up_compiling_a_released_model_runs_on_no_nan(how: str) -> None:
    options = {"recipe": "global", "freeze": True}
    model = nn.ModuleList(Layer() for _ in range(6 if how == "a function of the layer" else 1)).requires_grad_(False)
    call = torch.compile(lambda layer, x: layer(x), backend="fp8", dynamic=False, options=options)
    inputs = [torch.randn(rows, 64) for rows in ((4,) if len(model) > 1 else range(2, 8))]
    calls = [(layer, x) for layer in model for x in inputs]
    expected = [call(layer, x) for layer, x in calls]
    assert fp8fx.release(model) > 0
    for (layer, x), out in zip(calls, expected, strict=True):  # twice as many compilations, which is more than Dynamo's limit
        with contextlib.suppress(FreezeError):
            assert torch.equal(call(layer, x), out)


@pytest.mark.parametrize("freeze", [False, True])
def test_a_model_that_reads_a_buffer_in_python_is_traced_still(freeze: bool) -> None:
    class Looping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 64)
            self.register_buffer("steps", torch.tensor([0.5, 2.0, 1.0]))
            self.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            for i in range(self.steps.shape[0]):
                x = torch.relu(self.fc(x)) * float(self.steps[i])
            return x

    model, x = Looping(), torch.randn(4, 64)
    assert error(fp8fx.convert(model, freeze=freeze)(x), model(x)) < 0.1


class Plain(nn.Module):
    """A weight that is an attribute, no parameter and no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.randn(48, 64)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w)


@pytest.mark.usefixtures("uncompiled")
def test_a_model_whose_frozen_weights_are_all_attributes() -> None:
    model, x = Plain(), torch.randn(4, 64)
    call = compiled(model)
    call(x)
    model.w.mul_(-2)
    fp8fx.refresh(model)
    assert torch.equal(call(x), frozen(model)(x))
    fp8fx.refresh(call, {})
    assert torch.equal(call(x), frozen(model)(x))
    assert fp8fx.release(model) == 0


def test_a_frozen_buffer_that_no_state_dict_has_stays_as_it_is() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 8)
            self.register_buffer("w", torch.randn(16, 32), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(F.linear(x, self.w))
            return out

    model, other, x = Model().requires_grad_(False), Model().requires_grad_(False), torch.randn(4, 32)
    gm = fp8fx.convert(model, freeze=True)
    fp8fx.refresh(gm, other.state_dict())
    other.w = model.w
    assert torch.equal(gm(x), fp8fx.convert(other, freeze=True)(x))


def test_conjugates_and_their_parts_are_frozen_apart() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(32, 32, dtype=torch.complex64), requires_grad=False)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x @ self.w.imag, x @ self.w.conj().imag

    model, x = Parts(), torch.randn(8, 32)
    with torch.no_grad():
        for value, expected in zip(torch.compile(model, backend="fp8", options={"freeze": True})(x), model(x), strict=True):
            assert sqnr(expected, value) > 20


def test_a_view_of_memory_is_no_view_of_values() -> None:
    class Strided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(32, 32).t(), requires_grad=False)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x @ self.w.t(), x @ self.w.as_strided((32, 32), (1, 32))

    model, x = Strided(), torch.randn(8, 32)
    with torch.no_grad():
        for value, expected in zip(torch.compile(model, backend="fp8", options={"freeze": True})(x), model(x), strict=True):
            assert sqnr(expected, value) > 20
