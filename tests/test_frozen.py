"""Frozen weights from the user's side: what a converted and a compiled model hold, refresh, release, restore, and what is refused."""

from __future__ import annotations

import copy
import gc
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.testing import CompileCounterWithBackend

import fp8fx
from fp8fx.config import GLOBAL
from fp8fx.errors import DTypeError, FreezeError
from fp8fx.frozen import STORE
from fp8fx.numerics import quantize

recipes = pytest.mark.parametrize("recipe", ["mixed", "global", "rowwise"])

State = dict[str, Tensor]


class Model(nn.Module):
    """Siblings, an addmm over a weight (K, N), a norm, and nothing that needs gradients."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width // 2, bias=False)
        self.weight, self.bias = nn.Parameter(torch.randn(width, width) / 8), nn.Parameter(torch.randn(width))
        self.out = nn.Linear(width, width)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k = self.q(h), self.k(h)
        y = torch.addmm(self.bias, q * torch.cat([k, k], -1), self.weight)
        return self.out(torch.relu(y)) + x


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


def state_of(model: nn.Module) -> State:
    return {name: x.clone() for name, x in model.state_dict().items()}


def equal(a: State, b: State) -> bool:
    """Bit for bit, NaN included."""
    return a.keys() == b.keys() and all(torch.equal(a[k].flatten().view(torch.uint8), b[k].flatten().view(torch.uint8)) for k in a)


def frozen(model: nn.Module, recipe: str = "global", **options: Any) -> fx.GraphModule:
    return fp8fx.convert(fx.symbolic_trace(model), recipe=recipe, freeze=True, **options)


def compiled(model: nn.Module, recipe: str = "global", **options: Any) -> Any:
    return torch.compile(model, backend="fp8", options={"recipe": recipe, "freeze": True, **options})


def error(x: Tensor, reference: Tensor) -> float:
    return float((x.double() - reference.double()).norm() / reference.double().norm())


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


def test_a_state_dict_goes_through_files() -> None:
    model, x = Model(), torch.randn(4, 64)
    gm, file = frozen(model), io.BytesIO()
    torch.save(gm.state_dict(), file)
    file.seek(0)
    for state in (torch.load(file, weights_only=True), load(save(dict(gm.state_dict())))):
        other = frozen(Model())
        assert not torch.equal(other(x), gm(x))
        other.load_state_dict(state)
        assert torch.equal(other(x), gm(x))


def test_a_whole_module_is_copied_pickled_and_exported() -> None:
    model, x = Model(), torch.randn(4, 64)
    gm, file = frozen(model), io.BytesIO()
    expected = gm(x)
    for node in gm.graph.nodes:
        node.type = None  # fx cannot pickle annotations that are strings
    gm.recompile()
    torch.save(gm, file)
    file.seek(0)
    for other in (copy.deepcopy(gm), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), expected)
        fp8fx.refresh(other, {name: 2 * y for name, y in model.state_dict().items()})
        assert not torch.equal(other(x), expected)
        assert torch.equal(gm(x), expected)
    program = torch.export.export(gm, (x,))
    assert torch.equal(program.module()(x), expected)
    assert torch.equal(program.run_decompositions().module()(x), expected)
    assert gm.to("meta")(x.to("meta")).shape == expected.shape


def test_an_aotinductor_package_needs_no_pass_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, gm = torch.randn(4, 64), frozen(Model())
    program = torch.export.export(gm, (x,))
    monkeypatch.setattr(sys.modules["fp8fx.convert"], "run", None)  # what runs the passes
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    assert error(torch._inductor.aoti_load_package(path)(x), gm(x)) < 1e-6


def test_the_state_dict_of_the_model_before_is_refused() -> None:
    model = Model()
    gm = frozen(model)
    before = state_of(gm)
    with pytest.raises(FreezeError, match=r"has k\.weight, out\.weight, .*which this model holds frozen; fp8fx\.refresh"):
        gm.load_state_dict(model.state_dict())
    assert equal(state_of(gm), before)


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


@recipes
def test_a_converted_model_takes_new_weights(recipe: str) -> None:
    x, other = torch.randn(4, 64), Model()
    gm = frozen(Model(), recipe)
    fp8fx.refresh(gm, other.state_dict())
    assert torch.equal(gm(x), frozen(other, recipe)(x))


@every_way
def test_a_bad_refresh_of_a_converted_model_changes_nothing(how: str) -> None:
    gm = frozen(Model())
    before = state_of(gm)
    with pytest.raises(FreezeError, match=MESSAGES[how]):
        fp8fx.refresh(gm, broken(state_of(Model()), how))
    assert equal(state_of(gm), before)


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
        assert bool(parameter.isnan().all()) == (name in weights)
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
    assert bool(model.q.weight.isnan().all())


def test_a_graph_that_needs_a_released_weight_is_an_error() -> None:
    model, x = Model(), torch.randn(4, 64)
    call = compiled(model)
    call(x)
    fp8fx.release(call)
    with pytest.raises(BackendCompilerFailed, match=r"has been released, and a graph needs its value; fp8fx\.restore"):
        torch.compile(model, backend="fp8")(x)  # not frozen
    with pytest.raises(BackendCompilerFailed, match="has been released"):
        compiled(model, "rowwise")(x)


def test_another_dtype_after_freezing_is_an_error() -> None:
    model, x = Model(), torch.randn(4, 64)
    call = compiled(model)
    call(x)
    model.half()
    with pytest.raises(BackendCompilerFailed, match=r"was frozen as float32\(64, 64\) and is now float16\(64, 64\)"):
        call(x.half())


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


def test_a_model_of_the_same_class_gets_its_own_weights() -> None:
    """Dynamo calls a graph with the parameters of another model of the same class."""
    x, models = torch.randn(4, 64), [Model(), Model()]
    for model in models:
        assert error(compiled(model)(x), frozen(model)(x)) < 1e-5


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
