"""A converted model with frozen weights: what it holds, copies and files of it, every way to write a linear, and what
is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.fx.experimental.proxy_tensor import make_fx

import fp8fx
from fp8fx.errors import FreezeError
from fp8fx.graph.values import attribute
from fp8fx.ops.fp8_weight import FP8Weight
from fp8fx.ops.matmul import op
from fp8fx.recipes.quantize import sqnr
from tests.support.capture import Capture
from tests.support.freezing import (
    Model,
    State,
    check_copies,
    check_files,
    check_loads,
    check_moves,
    check_package,
    equal,
    error,
    frozen,
    state_of,
)
from tests.support.frozen_models import COPIES, Tied, compiled

recipes = pytest.mark.parametrize("recipe", ["mixed", "global", "rowwise"])


@recipes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_freezing_changes_no_bit_of_a_linear(recipe: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 100, bias=False)).to(dtype).requires_grad_(False)
    x = torch.randn(5, 64).to(dtype)
    gm = frozen(model, recipe)
    expected = fp8fx.convert(fx.symbolic_trace(model), recipe=recipe)(x)
    assert torch.equal(gm(x), expected)
    assert {gm.state_dict()[name].dtype for name in ("0.weight", "2.weight")} == {torch.float8_e4m3fn}
    # It is what fp8fx.freeze makes of the model itself.
    fp8fx.freeze(model, recipe)
    assert torch.equal(model(x), expected)
    assert equal(state_of(model), state_of(gm))


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
        *(f"{name}{suffix}" for name in ("q_weight_frozen", "weight", "out.weight") for suffix in ("", "_scale")),
    }


def test_resident_bytes_are_half_of_bfloat16s() -> None:
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(4))).bfloat16().requires_grad_(False)
    gm = frozen(model)
    assert not list(gm.buffers()) and not any(isinstance(y, Tensor) for y in gm.__dict__.values())
    parts = [x for weight in gm.parameters() for x in (weight.qdata, weight.scale)]
    held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in parts}
    assert sum(held.values()) <= 0.53 * sum(x.nbytes for x in model.parameters())


def test_a_tied_weight_stays_where_it_is_read_and_a_shared_one_is_frozen_once() -> None:
    model, tokens = Tied(), torch.randint(48, (3, 5))
    gm = frozen(model)
    weights = {name for name, x in gm.named_parameters() if isinstance(x, FP8Weight)}
    assert weights == {"head.weight", "twice.weight"}
    assert gm.get_parameter("embed.weight") is model.embed.weight
    assert error(gm(tokens), model(tokens)) < 0.06


@pytest.mark.parametrize(
    "make",
    [torch.export.export, lambda model, args: torch.export.export(model, args).module()],
    ids=["program", "module"],
)
def test_exported_programs_freeze(make: Callable[..., Any]) -> None:
    model, x = Model(), torch.randn(4, 64)
    gm = fp8fx.convert(make(model, (x,)), freeze=True, recipe="global")
    assert "q.weight" not in gm.state_dict()
    assert isinstance(gm.get_parameter("out.weight"), FP8Weight)
    assert torch.equal(gm(x), frozen(model)(x))


@recipes
@pytest.mark.parametrize("check", [check_files, check_copies, check_loads, check_moves])
def test_files_copies_loads_and_moves(check: Callable[[str, str], None], recipe: str) -> None:
    check("cpu", recipe)


@pytest.mark.parametrize(
    ("kind", "copied"),  # torch pickles nothing that torch.export made
    [
        ("ep.module()", "deepcopy"),
        *((kind, way) for kind in ("nn.Module", "symbolic_trace") for way in list(COPIES)[1:-1]),
    ],
)
def test_a_whole_module_is_copied_and_pickled(kind: str, copied: str) -> None:
    model, x = Model(), torch.randn(4, 64)
    gm = fp8fx.convert(GRAPHS[kind](model, x), freeze=True)
    expected, other = gm(x), COPIES[copied](gm)
    assert torch.equal(other(x), expected)
    assert str(other.meta["fp8fx_report"]) == str(gm.meta["fp8fx_report"])
    assert equal(state_of(other), state_of(gm))
    state = {name: 2 * y for name, y in model.state_dict().items()}
    other.load_state_dict(state)
    assert torch.equal(other(x), fp8fx.convert(_loaded(state), freeze=True)(x))
    assert torch.equal(gm(x), expected)
    other.load_state_dict(gm.state_dict())
    assert torch.equal(other(x), expected)


def _loaded(state: State) -> Model:
    model = Model()
    model.load_state_dict(state)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("copied", ["itself", "deepcopy", "torch.save"])
def test_a_whole_module_is_exported(copied: str) -> None:
    x, gm = torch.randn(4, 64), COPIES[copied](frozen(Model()))
    expected, other = gm(x), copy.deepcopy(gm)
    program = torch.export.export(gm, (x,))
    assert torch.equal(program.module()(x), expected)
    assert torch.equal(program.run_decompositions().module()(x), expected)
    assert other.to("meta")(x.to("meta")).shape == expected.shape


@pytest.mark.compiles
@pytest.mark.parametrize(
    ("recipe", "rows", "dynamic"), [("mixed", (4,), False), ("global", (4, 2, 7), True), ("rowwise", (4, 1, 3), True)]
)
def test_an_aotinductor_package_runs_without_us(
    recipe: str, rows: tuple[int, ...], dynamic: bool, tmp_path: Path
) -> None:
    check_package(tmp_path, "cpu", recipe, rows, dynamic)


def test_what_was_frozen_can_be_printed() -> None:
    """Siblings' biases are frozen as one, and no longer their modules'."""
    gm = frozen(Model())
    assert gm.get_submodule("q").bias is None
    assert "Linear(in_features=64, out_features=64" in repr(gm)


def test_half_of_a_frozen_model_multiplies_halves() -> None:
    gm, x = frozen(Model()), torch.randn(4, 64)
    expected, data = gm(x), gm.get_parameter("out.weight").qdata.clone()
    gm.half()
    assert torch.equal(gm.get_parameter("out.weight").qdata.float(), data.float())
    assert gm(x.half()).dtype == torch.float16
    assert error(gm(x.half()), expected) < 0.02


def test_a_single_row_is_not_quantized_if_that_was_chosen() -> None:
    gm, x = frozen(nn.Sequential(nn.Linear(64, 48, bias=False)).requires_grad_(False)), torch.randn(1, 64)
    weight = gm.get_parameter("0.weight").dequantize()
    for node in gm.graph.nodes:
        if node.target is op("global"):
            node.update_kwarg("weight_only", True)
    gm.recompile()
    assert error(gm(x), x @ weight.t()) < 1e-6
    assert error(gm(torch.cat([x, x])), x @ weight.t()) > 1e-3


def test_an_executor_that_is_named_multiplies() -> None:
    model, x = Model(), torch.randn(4, 64)
    gm = frozen(model, executor="simulated")
    products = gm.graph.find_nodes(op="call_function", target=op("global"))
    assert [node.kwargs["executor"] for node in products] == ["simulated"] * 3
    assert torch.equal(gm(x), frozen(model)(x))


@recipes
def test_compiled_by_fp8_it_reads_its_weights_as_they_are(recipe: str) -> None:
    gm, x, capture = frozen(Model(), recipe), torch.randn(4, 64), Capture(fp8fx.Config(recipe=recipe))
    call = torch.compile(gm, backend=capture, fullgraph=True)
    assert torch.equal(call(x), gm(x))
    products = capture.only.after.graph.find_nodes(op="call_function", target=op(recipe))
    assert len(products) == 3 and all("b_scale" in node.kwargs for node in products)
    gm.load_state_dict(Model().state_dict())
    assert torch.equal(call(x), gm(x))
    assert len(capture.graphs) == 1


@pytest.mark.compiles
@pytest.mark.parametrize("backend", ["inductor", "fp8"])
def test_compiled_it_computes_the_same(backend: str) -> None:
    gm, x = frozen(Model()), torch.randn(4, 64)
    with torch.no_grad():
        assert error(torch.compile(gm, backend=backend)(x), gm(x)) < 1e-5


@pytest.mark.compiles
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
    assert any(isinstance(y, FP8Weight) for y in new.parameters())
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


@pytest.mark.slow
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
    gm.load_state_dict(state if isinstance(state, dict) else state())
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
    return [
        *((name, id(x), x._version) for name, x in tensors),
        *((name, id(m), sorted(m.__dict__)) for name, m in modules),
    ]


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
    assert sum(y.numel() for y in gm.parameters() if isinstance(y, FP8Weight)) == 2 * 64 * 64
    others = [y for y in (*gm.parameters(), *gm.buffers()) if not isinstance(y, FP8Weight)]
    assert max(y.numel() for y in others) == 64
    doubled = Shared()
    doubled.load_state_dict({name: 2 * y for name, y in model.state_dict().items()})
    gm.load_state_dict({name: 2 * y for name, y in graph.state_dict().items()})
    assert torch.equal(gm(x), fp8fx.convert(doubled)(x))


@pytest.mark.compiles
def test_a_tied_weight_takes_the_new_values_in_both_places() -> None:
    model, other, tokens = Tied(), Tied(), torch.randint(48, (3, 5))
    gm, call = frozen(model), compiled(model)
    call(tokens)
    gm.load_state_dict(other.state_dict())
    model.load_state_dict(other.state_dict())
    for new in (gm, call):
        assert error(new(tokens), frozen(other)(tokens)) < 1e-5
    assert torch.equal(gm.get_parameter("embed.weight"), other.embed.weight)


def test_what_was_left_out_is_frozen_later() -> None:
    x, model, other = torch.randn(4, 64), Model(), Model()
    part = frozen(model, exclude="out")
    whole = fp8fx.convert(part, freeze=True, recipe="global")
    assert torch.equal(whole(x), frozen(model)(x))
    whole.load_state_dict(other.state_dict())
    assert torch.equal(whole(x), frozen(other)(x))


def test_a_model_converted_in_inference_mode_takes_new_weights_outside_it() -> None:
    x, model, other = torch.randn(4, 64), Model(), Model()
    with torch.inference_mode():
        gm = frozen(model)
    gm.load_state_dict(other.state_dict())
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


@pytest.mark.compiles
def test_conjugates_and_their_parts_are_frozen_apart() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(32, 32, dtype=torch.complex64), requires_grad=False)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x @ self.w.imag, x @ self.w.conj().imag

    model, x = Parts(), torch.randn(8, 32)
    with torch.no_grad():
        for value, expected in zip(
            torch.compile(model, backend="fp8", options={"freeze": True})(x), model(x), strict=True
        ):
            assert sqnr(expected, value) > 20


@pytest.mark.compiles
def test_a_view_of_memory_is_no_view_of_values() -> None:
    class Strided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(32, 32).t(), requires_grad=False)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x @ self.w.t(), x @ self.w.as_strided((32, 32), (1, 32))

    model, x = Strided(), torch.randn(8, 32)
    with torch.no_grad():
        for value, expected in zip(
            torch.compile(model, backend="fp8", options={"freeze": True})(x), model(x), strict=True
        ):
            assert sqnr(expected, value) > 20
