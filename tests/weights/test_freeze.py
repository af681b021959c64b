"""fp8fx.freeze: which weights of a model become FP8, and that it is an ordinary model afterwards."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from accelerate import cpu_offload, disk_offload
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import fp8fx
from fp8fx import FP8Weight
from fp8fx.errors import ConfigError, FreezeError, GraphError
from fp8fx.recipes.recipe import RECIPES
from tests.support.numbers import error

recipes = pytest.mark.parametrize("recipe", sorted(RECIPES))


class Model(nn.Module):
    """An embedding that is tied to the head, a block of linears, and a linear of transformers' own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 64)
        self.block = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64, bias=False))
        self.conv = Conv1D(64, 64)
        self.head = nn.Linear(64, 96, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.conv(self.block(self.embed(ids))))


FROZEN = ["block.0.weight", "block.2.weight", "conv.weight", "head.weight"]


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().requires_grad_(False)


@pytest.fixture
def ids() -> Tensor:
    return torch.arange(24).view(2, 12)


def fp8_names(model: nn.Module) -> list[str]:
    return [name for name, x in model.named_parameters() if isinstance(x, FP8Weight)]


# Which weights.


@recipes
def test_the_weights_of_linears_become_fp8(recipe: str, model: Model, ids: Tensor) -> None:
    before = model(ids)
    tied = model.embed.weight
    report = fp8fx.freeze(model, recipe)
    assert fp8_names(model) == FROZEN
    assert model.embed.weight is tied  # the embedding keeps what it needs
    assert [row.name for row in report.rewritten] == FROZEN
    assert report.refused == ()
    assert {row.op for row in report.rows} == {f"matmul_fp8_{recipe}"}
    assert [(row.k, row.n) for row in report.rows] == [("64", "128"), ("128", "64"), ("64", "64"), ("64", "96")]
    assert 1e-3 < error(model(ids), before) < 0.1


def test_the_user_chooses(model: Model) -> None:
    report = fp8fx.freeze(model, include=["block.*", "head"], exclude="*.2", min_features=65)
    reasons = {row.name: row.reason for row in report.refused}
    assert reasons == {
        "block.0.weight": "K=64, N=128: below min_features=65",
        "block.2.weight": "excluded by '*.2'",
        "conv.weight": "not among include='block.*', 'head'",
        "head.weight": "K=64, N=96: below min_features=65",
    }
    assert fp8_names(model) == []


def test_twice_is_once(model: Model, ids: Tensor) -> None:
    fp8fx.freeze(model, exclude="head")
    y = model(ids)
    weights = [model.block[0].weight, model.conv.weight]
    report = fp8fx.freeze(model, "mixed", exclude="head")
    assert [model.block[0].weight, model.conv.weight] == weights
    assert {row.op for row in report.rewritten} == {"matmul_fp8_rowwise"}  # as they are
    assert torch.equal(model(ids), y)


def test_linears_that_share_a_weight_share_it_in_fp8() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).requires_grad_(False)
    model[1].weight = model[0].weight
    fp8fx.freeze(model)
    assert model[1].weight is model[0].weight


def test_attention(model: Model) -> None:
    attention = nn.MultiheadAttention(32, 2, batch_first=True).requires_grad_(False).eval()
    x = torch.randn(2, 5, 32)
    expected = attention(x, x, x)[0]
    fp8fx.freeze(attention)
    assert fp8_names(attention) == ["in_proj_weight", "out_proj.weight"]
    assert error(attention(x, x, x)[0], expected) < 0.1


def test_float64_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(32, 32).double(), nn.Linear(32, 32)).requires_grad_(False)
    report = fp8fx.freeze(model)
    assert [row.name for row in report.refused] == ["0.weight"]
    assert "float64" in str(report.refused[0].reason)


def _nan(model: Model) -> None:
    model.conv.weight[0, 0] = torch.nan


@pytest.mark.parametrize(
    ("spoil", "arguments", "kind", "text"),
    [
        (_nan, {}, FreezeError, "conv.weight: inf or NaN"),
        (lambda model: model.block.requires_grad_(True), {}, FreezeError, "block.0.weight requires grad"),
        (None, {"recipe": "rowise"}, ConfigError, "Did you mean 'rowwise'"),
        (None, {"include": 3}, ConfigError, "not a pattern"),
    ],
)
def test_bad_input_changes_nothing(
    spoil: Callable[[Model], object] | None, arguments: Any, kind: type[Exception], text: str, model: Model
) -> None:
    if spoil is not None:
        spoil(model)
    with pytest.raises(kind, match=text):
        fp8fx.freeze(model, **arguments)
    assert fp8_names(model) == []


def test_what_is_no_model() -> None:
    with pytest.raises(GraphError, match="freeze got a function"):
        fp8fx.freeze(lambda x: x)  # type: ignore[arg-type]


def test_no_grad_is_an_answer(model: Model) -> None:
    model.requires_grad_(True)
    with torch.no_grad():
        fp8fx.freeze(model)
    assert fp8_names(model) == FROZEN
    assert not any(model.get_parameter(name).requires_grad for name in FROZEN)


class Raw(nn.Module):
    """Parameters that no module of torch holds, a router, and experts."""

    def __init__(self) -> None:
        super().__init__()
        self.nk, self.kn = nn.Parameter(torch.randn(48, 64)), nn.Parameter(torch.randn(64, 64))
        self.experts, self.transposed = nn.Parameter(torch.randn(4, 64, 48)), nn.Parameter(torch.randn(4, 64, 32))
        self.table = nn.Parameter(torch.randn(10, 64))
        self.router = nn.Linear(64, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.addmm(self.table[0], x, self.kn)
        chosen = self.router(h).softmax(-1).topk(1).indices.sum()
        y = h @ self.nk.T
        offs = torch.tensor([2, 3, 5, 8], dtype=torch.int32)
        y = F.grouped_mm(y, self.experts.mT, offs=offs)
        return F.grouped_mm(y, self.transposed, offs=offs) + chosen


RAW = ["nk", "kn", "experts", "transposed"]


@torch.no_grad()
def test_parameters_that_a_call_reads_as_weights() -> None:
    torch.manual_seed(0)
    model, x = Raw().bfloat16(), torch.randn(8, 64).bfloat16()
    other = copy.deepcopy(model)
    report = fp8fx.freeze(other)
    assert [row.name for row in report.rows] == ["router.weight"]
    before = model(x)
    report = fp8fx.freeze(model, inputs=(x,))
    assert sorted(row.name for row in report.rewritten) == sorted(RAW)
    assert {row.name: row.reason for row in report.refused} == {
        "router.weight": "a router: topk chooses by it; routers=True rewrites it too"
    }
    assert sorted(fp8_names(model)) == sorted(RAW)
    assert [model.kn.is_transposed, model.nk.is_transposed] == [True, False]  # type: ignore[union-attr]
    assert [model.transposed.is_transposed, model.experts.is_transposed] == [True, False]  # type: ignore[union-attr]
    assert 1e-3 < error(model(x), before) < 0.12
    assert fp8fx.freeze(other, routers=True, inputs=(x,)).refused == ()


# State dicts.


@recipes
def test_a_state_dict_has_plain_tensors(recipe: str, model: Model) -> None:
    fp8fx.freeze(model, recipe)
    state = model.state_dict()
    assert {name for name in state if name.endswith("_scale")} == {f"{name}_scale" for name in FROZEN}
    for name in FROZEN:
        weight = model.get_parameter(name)
        assert state[name].dtype == torch.float8_e4m3fn
        assert state[name].shape == weight.shape
        assert state[f"{name}_scale"].dtype == torch.float32
        data = state[name].as_subclass(Tensor)
        assert torch.equal(data.float() * state[f"{name}_scale"], weight.dequantize())


def _by_torch_save(model: nn.Module, other: nn.Module, path: Path) -> None:
    torch.save(model.state_dict(), path)
    state = torch.load(path, weights_only=True)
    assert all(type(x) is Tensor for x in state.values())
    other.load_state_dict(state)


def _by_safetensors(model: nn.Module, other: nn.Module, path: Path) -> None:
    safetensors.torch.save_file(model.state_dict(), path)
    other.load_state_dict(safetensors.torch.load_file(path))


def _by_save_model(model: nn.Module, other: nn.Module, path: Path) -> None:
    safetensors.torch.save_model(model, str(path))
    safetensors.torch.load_model(other, str(path))


def _by_itself(model: nn.Module, other: nn.Module, path: Path) -> None:
    other.load_state_dict(model.state_dict())


def _by_a_copy(model: nn.Module, other: nn.Module, path: Path) -> None:
    other.load_state_dict({name: x.clone() for name, x in copy.deepcopy(model.state_dict()).items()})


def _by_assignment(model: nn.Module, other: nn.Module, path: Path) -> None:
    other.to("meta").load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


def _compiled(model: nn.Module, other: nn.Module, path: Path) -> None:
    torch.compile(other, backend="eager").load_state_dict(torch.compile(model, backend="eager").state_dict())


ROUND_TRIPS = [
    _by_itself,
    _by_a_copy,
    _by_torch_save,
    _by_safetensors,
    _by_save_model,
    _by_assignment,
    _compiled,
]


@recipes
@pytest.mark.parametrize("way", ROUND_TRIPS, ids=lambda way: way.__name__.strip("_"))
def test_round_trips(way: Callable[..., None], recipe: str, model: Model, ids: Tensor, tmp_path: Path) -> None:
    fp8fx.freeze(model, recipe)
    torch.manual_seed(1)
    other = Model().requires_grad_(False)
    fp8fx.freeze(other, recipe)
    way(model, other, tmp_path / "model")
    assert torch.equal(other(ids), model(ids))
    assert fp8_names(other) == FROZEN
    for name in FROZEN:
        assert torch.equal(other.get_parameter(name).scale, model.get_parameter(name).scale)
    assert other.conv.weight.qdata.stride() == (1, 64)


@recipes
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_in_high_precision_is_quantized(recipe: str, assign: bool, model: Model, ids: Tensor) -> None:
    state = {name: x.clone() for name, x in model.state_dict().items()}
    fp8fx.freeze(model, recipe)
    with torch.device("meta"):
        other = Model().requires_grad_(False)
    fp8fx.freeze(other, recipe)
    if not assign:
        other = other.to_empty(device="cpu")
    other.load_state_dict(state, assign=assign)
    assert fp8_names(other) == FROZEN
    assert torch.equal(other(ids), model(ids))


def test_a_cast_of_what_is_saved_is_the_weight_and_not_its_codes(model: Model) -> None:
    fp8fx.freeze(model)
    saved, weight = model.state_dict()["conv.weight"], model.conv.weight
    for cast in (saved.to(torch.float32), saved.clone().cpu().to("cpu", torch.float32)):
        assert torch.equal(cast.dequantize(), weight.dequantize())
    for method in ("float", "double", "half", "bfloat16"):
        with pytest.raises(FreezeError, match=f"was cast by {method} apart from its scale"):
            getattr(saved, method)()


def _spoilt(change: Callable[[dict[str, Any]], object]) -> Callable[[Any], dict[str, Any]]:
    def spoil(state: Any) -> dict[str, Any]:
        change(state)
        return state

    return spoil


NAME, SCALE = "conv.weight", "conv.weight_scale"
SPOILT = {
    "data without a scale": (lambda s: s.pop(SCALE), "conv.weight: FP8 data without a scale"),
    "a scale without data": (lambda s: s.pop(NAME), "conv.weight: a scale without data"),
    "high precision with a scale": (lambda s: s.update({NAME: torch.randn(64, 64)}), "torch.float32 with a scale"),
    "another shape": (lambda s: s.update({NAME: s[NAME][:3]}), r"\(3, 64\) in the state dict; expected \(64, 64\)"),
    "a scale of another shape": (lambda s: s.update({SCALE: torch.ones(3, 1)}), r"its scale is torch.float32 \(3, 1\)"),
    "a scale that is NaN": (lambda s: s[SCALE].fill_(torch.nan), "its scale is not finite"),
    "another format": (
        lambda s: s.update({NAME: torch.zeros(64, 64, dtype=torch.float8_e5m2)}),
        "torch.float8_e5m2 in the state dict",
    ),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_a_spoilt_state_dict_loads_nothing(fault: str, model: Model, ids: Tensor) -> None:
    fp8fx.freeze(model)
    torch.manual_seed(1)
    other = Model().requires_grad_(False)
    fp8fx.freeze(other)
    before = other(ids)
    state = copy.deepcopy(model.state_dict())
    spoil, text = SPOILT[fault]
    spoil(state)
    with pytest.raises(FreezeError, match=text):
        other.load_state_dict(state)
    assert torch.equal(other(ids), before)


def test_a_state_dict_without_a_weight_loads_if_it_is_not_strict(model: Model, ids: Tensor) -> None:
    """As one of adapters is."""
    fp8fx.freeze(model)
    before = model.conv.weight.dequantize()
    state = copy.deepcopy(model.state_dict())
    del state[NAME], state[SCALE], state["block.0.weight_scale"]
    state["block.0.weight"] = torch.ones(128, 64)
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "conv.weight"'):
        model.load_state_dict(state)
    assert model.load_state_dict(state, strict=False).missing_keys == [NAME]
    assert torch.equal(model.conv.weight.dequantize(), before)
    assert torch.equal(model.block[0].weight.dequantize(), torch.ones(128, 64))


def test_a_state_dict_of_another_recipe_loads_nothing(model: Model, ids: Tensor) -> None:
    fp8fx.freeze(model, "mixed")
    other = Model().requires_grad_(False)
    fp8fx.freeze(other, "rowwise")
    before = other(ids)
    with pytest.raises(FreezeError, match=r"block\.0\.weight: saved by recipe 'mixed'; expected 'rowwise'"):
        other.load_state_dict(model.state_dict())
    assert torch.equal(other(ids), before)


def test_a_model_that_is_not_frozen_refuses_it(model: Model) -> None:
    other = copy.deepcopy(model)
    fp8fx.freeze(model)
    with pytest.raises(RuntimeError, match="weight_scale"):
        other.load_state_dict(model.state_dict())


def test_a_whole_model_is_pickled(model: Model, ids: Tensor) -> None:
    fp8fx.freeze(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(ids), model(ids))
    assert sorted(loaded.state_dict()) == sorted(model.state_dict())


# Memory.


def test_each_weight_goes_when_its_fp8_one_is_there() -> None:
    """At no time is there more than the model, and an FP8 weight."""
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)]).requires_grad_(False)
    alive: list[int] = []
    quantized = FP8Weight._quantized.__func__  # type: ignore[attr-defined]
    import weakref

    originals = [weakref.ref(layer.weight) for layer in model]

    def count(cls: Any, *args: Any) -> Any:
        alive.append(sum(x() is not None for x in originals))
        return quantized(cls, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FP8Weight, "_quantized", classmethod(count))
        fp8fx.freeze(model)
    assert alive == [4, 3, 2, 1]


# What others do with a model.


def test_cpu_offload(model: Model, ids: Tensor) -> None:
    fp8fx.freeze(model)
    y = model(ids)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert {x.device.type for x in model.parameters()} == {"meta"}
    assert torch.equal(model(ids), y)
    assert torch.equal(model(ids), y)


def test_disk_offload_is_refused(model: Model, tmp_path: Path) -> None:
    """It writes bytes without their scale, and would read them as values."""
    fp8fx.freeze(model)
    with pytest.raises(FreezeError, match="use cpu_offload, or save the state dict"):
        disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))


def test_adapters_train_on_it(model: Model, ids: Tensor) -> None:
    fp8fx.freeze(model)
    a, b = nn.Parameter(torch.randn(4, 64) / 8), nn.Parameter(torch.zeros(128, 4))
    layer = model.block[0]
    layer.register_forward_hook(lambda module, args, out: out + F.linear(F.linear(args[0], a), b))
    optimizer = torch.optim.AdamW([a, b, *model.parameters()], lr=1e-2)
    before = [model.get_parameter(name).dequantize() for name in FROZEN]
    losses = []
    for _ in range(10):
        loss = F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(model.get_parameter(name).dequantize(), x) for name, x in zip(FROZEN, before, strict=True))
