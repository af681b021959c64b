"""decide: what the user leaves out or FP8 would make slower becomes a Refusal, and the graph stays as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional as F

from fp8fx import hardware
from fp8fx.config import Config
from fp8fx.passes import decide, match, replace
from tests.capture import after


class Block(nn.Module):
    """A linear called as a module and one written out."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 32)
        self.down = nn.Parameter(torch.randn(32, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.up(x)) @ self.down


class Model(nn.Module):
    """Two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 100)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


ALL = ["layers.0.up.weight", "layers.0.down", "layers.1.up.weight", "layers.1.down", "head.weight"]


def kept(**options: Any) -> list[str]:
    """The weights of what is left to rewrite."""
    gm = fx.symbolic_trace(Model())
    rewrite = after([match, decide], gm, **options)
    assert str(rewrite.gm.graph) == str(gm.graph)
    assert rewrite.results[1].modified is False
    assert rewrite.results[1].count == len(rewrite.refusals) == 5 - len(rewrite.matches)
    return [m.name for m in rewrite.matches]


def reasons(**options: Any) -> dict[str, str]:
    """The reason for each weight that is left out."""
    return {r.name: r.reason for r in after([match, decide], Model(), **options).refusals}


def test_the_default_keeps_all() -> None:
    assert kept() == ALL


@pytest.mark.parametrize(
    ("pattern", "left_out"),
    [
        ("head", ["head.weight"]),  # the module's path
        ("head.weight", ["head.weight"]),  # the weight's name
        ("layers.0", ["layers.0.down"]),  # the path of the module that a written-out linear stands in
        ("layers.0.*", ["layers.0.up.weight", "layers.0.down"]),
        ("*.down", ["layers.0.down", "layers.1.down"]),
        ("*.up", ["layers.0.up.weight", "layers.1.up.weight"]),
        ("layers.[1-9].*", ["layers.1.up.weight", "layers.1.down"]),
        ("*", ALL),
        ("HEAD", []),
        ("ead", []),
    ],
)
def test_exclude_and_include(pattern: str, left_out: list[str]) -> None:
    assert kept(exclude=pattern) == [name for name in ALL if name not in left_out]
    assert kept(include=pattern) == left_out
    assert reasons(exclude=pattern) == dict.fromkeys(left_out, f"excluded by {pattern!r}")
    assert reasons(include=pattern) == {name: f"not among include={pattern!r}" for name in ALL if name not in left_out}


def test_exclude_wins_over_include() -> None:
    assert kept(include="layers.*", exclude="layers.1*") == ["layers.0.up.weight", "layers.0.down"]


def test_several_patterns() -> None:
    assert kept(include=("head", "layers.0.up")) == ["layers.0.up.weight", "head.weight"]
    assert reasons(include=("a", "b"))["head.weight"] == "not among include='a', 'b'"
    assert reasons(exclude=("a", "head", "h*"))["head.weight"] == "excluded by 'head'"  # the first that fits


@pytest.mark.parametrize(
    ("least", "left"),
    [(0, ALL), (8, ALL), (9, [])],
)
def test_min_features(least: int, left: list[str]) -> None:
    assert kept(min_features=least) == left


def test_min_features_counts_the_smaller_of_k_and_n() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 8))
    rewrite = after([match, decide], model, min_features=32)
    assert [m.path for m in rewrite.matches] == ["1"]
    assert [r.reason for r in rewrite.refusals] == ["K=8, N=32: below min_features=32", "K=32, N=8: below min_features=32"]


def test_a_shared_module_is_left_out_every_time_it_is_called() -> None:
    linear = nn.Linear(8, 8)
    rewrite = after([match, decide], nn.Sequential(linear, nn.ReLU(), linear), exclude="0")
    assert (rewrite.matches, [r.path for r in rewrite.refusals]) == ([], ["0", "0"])


def test_nothing_to_decide() -> None:
    rewrite = after([match, decide], nn.ReLU(), exclude="*")
    assert (rewrite.matches, rewrite.refusals, rewrite.results[1].count) == ([], [], 0)


def test_should_rewrite_itself() -> None:
    found = after([match], Model()).matches[-1]
    assert decide.should_rewrite(found, Config()) is None
    assert decide.should_rewrite(found, Config(min_features=9)) == "K=8, N=100: below min_features=9"


# Worth it? Weighed only where there are tensor cores; here the test says that there are.


class Attention(nn.Module):
    """Linears whose operands come from every kind of place."""

    def __init__(self, width: int = 1024) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out, self.up, self.tiny = nn.Linear(width, width), nn.Linear(width, 4 * width), nn.Linear(4 * width, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = F.rms_norm(x, x.shape[-1:])
        q, k, v = (f(h).unflatten(-1, (4, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.tiny(F.gelu(self.up(y + x)))


@pytest.fixture
def _tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "has_fp8_tensor_cores", lambda device: True)


class _CapturedError(Exception):
    """Raised once the graph is there: these models are too large to run on a CPU."""


def captured(model: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    """Dynamo's graph."""
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(gm)
        raise _CapturedError

    with pytest.raises(BackendCompilerFailed):
        torch.compile(model, backend=keep)(*inputs)
    (graph,) = graphs
    return graph


def matmuls(gm: fx.GraphModule) -> list[fx.Node]:
    """The nodes that are FP8 matmul ops."""
    return [n for n in gm.graph.nodes if "matmul_fp8" in str(n.target)]


def large(rows: int, trained: bool = True, width: int = 1024) -> tuple[nn.Module, Tensor]:
    with torch.device("meta"):
        model = Attention(width).to(torch.bfloat16).requires_grad_(trained)
    x = torch.zeros(4, rows, width, dtype=torch.bfloat16).requires_grad_(trained)
    return model.to_empty(device="cpu"), x


@pytest.mark.usefixtures("_tensor_cores")
@pytest.mark.parametrize("recipe", ["mixed", "global"])
def test_each_gemm_is_weighed_by_its_own_sizes(recipe: str) -> None:
    rewrite = after([match, decide], captured(*large(4096)), recipe=recipe)
    (up,) = [rewrite.choices[m.node] for m in rewrite.matches if m.path.endswith("up")]
    assert up.fp8 == (("forward",) if recipe == "mixed" else ("forward", "dgrad", "wgrad"))
    assert ("dgrad 1.0" in up.remark) == (recipe == "mixed")
    (refused,) = [r for r in rewrite.refusals if r.path.endswith("tiny")]
    assert refused.reason.startswith("FP8 is not worth it, predicted: forward 0.") and refused.reason.endswith("x at M=16384")


@pytest.mark.usefixtures("_tensor_cores")
def test_few_rows_leave_everything_alone_and_always_takes_everything() -> None:
    graph = captured(*large(2))
    rewrite = after([match, decide], graph)
    assert rewrite.matches == []
    assert all("at M=8" in r.reason for r in rewrite.refusals if "not worth it" in r.reason)
    rewrite = after([match, decide], graph, profit="always")
    assert len(rewrite.matches) == 6
    assert {rewrite.choices[m.node].fp8 for m in rewrite.matches} == {("forward", "dgrad")}


def test_without_tensor_cores_nothing_is_weighed() -> None:
    rewrite = after([match, decide], captured(*large(2)))
    assert len(rewrite.matches) == 6
    assert {rewrite.choices[m.node].remark for m in rewrite.matches} == {""}


@pytest.mark.usefixtures("_tensor_cores")
def test_without_gradients_only_forward_is_weighed() -> None:
    assert {c.fp8 for c in after([match, decide], captured(*large(4096, trained=False))).choices.values()} == {("forward",)}
    with torch.no_grad():
        assert {c.fp8 for c in after([match, decide], captured(*large(4096)), recipe="global").choices.values()} == {("forward",)}


@pytest.mark.usefixtures("_tensor_cores")
def test_an_unknown_m_is_not_weighed() -> None:
    assert len(after([match, decide], nn.Sequential(nn.Linear(8, 8))).matches) == 1


@pytest.mark.usefixtures("_tensor_cores")
def test_siblings_share_the_cost_of_their_input_and_a_fused_cast_is_cheaper(monkeypatch: pytest.MonkeyPatch) -> None:
    weighed = []

    def spy(linear: Any, recipe: Any) -> Any:
        weighed.append((linear.siblings, linear.input_fused, linear.grad_fused))
        return choose(linear, recipe)

    choose = decide.choose
    monkeypatch.setattr(decide, "choose", spy)
    after([match, decide], captured(*large(64)))
    norm_to_attention, attention_to_add = (3, True, False), (1, False, True)
    assert weighed == [norm_to_attention] * 3 + [attention_to_add, (1, True, True), (1, True, False)]


@pytest.mark.usefixtures("_tensor_cores")
def test_what_is_not_worth_it_becomes_an_argument_of_the_op() -> None:
    rewrite = after([match, decide, replace], captured(*large(256, width=4096)), recipe="global")
    kwargs = {m.path.rpartition(".")[2]: n.kwargs for m, n in zip(rewrite.matches, matmuls(rewrite.gm), strict=True)}
    assert {name: {k: v for k, v in given.items() if k != "bias"} for name, given in kwargs.items()} == {
        "up": {"dgrad": False, "forward": False}
    }
