"""Real architectures through the backend: some on every machine, all of them by `pytest -m zoo tests/zoo`, on tensor
cores by `-m gpu`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fp8fx.executors.hardware import has_fp8_tensor_cores

pytest.importorskip("transformers", reason="the demo extra is not installed", exc_type=ModuleNotFoundError)

from tests.zoo.judge import ACTIVATIONS, GOAL, ROUTER, SHORT, Coverage, Eager, _run, judge
from tests.zoo.models import ZOO, Built


# One of each kind, here: grouped heads, a weight on the left, an encoder, two stacks with one head.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama", "Mamba", "BERT", "T5"])
def test_rewritten_and_run_eagerly(name: str) -> None:
    assert judge(name, runs=[("inference", "mixed"), ("training", "global")], backend=Eager).problems == []


# And here: addmm over (K, N), experts, images, fused.
@pytest.mark.compiles
@pytest.mark.parametrize(
    ("name", "kind", "recipe"),
    [
        ("GPT-2", "inference", "global"),
        ("Mixtral-grouped", "inference", "mixed"),
        ("ViT", "inference", "mixed"),
        ("MultiheadAttention", "training", "mixed"),
    ],
)
def test_through_inductor(name: str, kind: str, recipe: str) -> None:
    assert judge(name, runs=[(kind, recipe)]).problems == []


def test_what_falls_short_of_the_goal_is_a_problem_but_for_those_that_cannot_reach_it() -> None:
    def problems(name: str, share: float, *reasons: str) -> list[str]:
        return Coverage(9, 9, 8, dict.fromkeys(reasons, 1), share, share).problems(name)

    assert problems("GPT-2", GOAL) == []
    assert problems("GPT-2", 0.94) == ["94.0% of the FLOPs of weights in FP8, not 95%"]
    for name, (least, reasons) in SHORT.items():
        assert problems(name, least, *reasons) == []
        assert problems(name, least - 0.01, *reasons) == ["23.0% of the FLOPs of weights in FP8, not 24%"]
        assert problems(name, least) == [f"without the reason: {reason}" for reason in sorted(reasons)]


@pytest.mark.slow
def test_routers_stay_in_high_precision_and_the_report_says_so() -> None:
    verdict = judge("Mixtral-batched", runs=[("inference", "mixed")], backend=Eager)
    assert verdict.problems == []
    assert verdict.coverage.refused[ROUTER] == 2


@pytest.mark.slow
def test_what_no_graph_shows_counts_as_left_alone() -> None:
    verdict = judge("Mixtral-eager", runs=[("inference", "mixed")], backend=Eager)
    assert verdict.problems == []
    assert verdict.runs[0].graphs == verdict.runs[0].expected > 1


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).relu()


class _Layers(nn.Module):
    """Equal layers, called from a loop that Dynamo leaves to Python: it compiles one graph for all."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            torch._dynamo.graph_break()
            x = layer(x)
        return x


def test_a_graph_that_several_layers_share_counts_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    built = Built(_Layers(), {"x": torch.randn(32, 64)}, lambda output: output, Tensor.sum)
    monkeypatch.setitem(ZOO, "layers", lambda: built)
    verdict = judge("layers", backend=Eager)
    assert max(run.graphs for run in verdict.runs) < 3
    assert [run.coverage for run in verdict.runs] == [Coverage(3, 3, 3, {}, 1.0, 1.0)] * 4


class _Unread(nn.Linear):
    def __init__(self) -> None:
        super().__init__(64, 64)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x), self.scale.exp()


def test_what_has_no_gradient_in_eager_mode_has_zeros_in_a_compiled_graph() -> None:
    built = Built(_Unread(), {"x": torch.randn(8, 64)}, lambda output: output[0], Tensor.sum)
    eager, compiled = (
        _run(built, built.model, call, training=True)
        for call in (built.model, torch.compile(built.model, backend="aot_eager"))
    )
    assert eager.gradients["scale"].equal(torch.zeros(3, dtype=torch.float64))
    assert eager.gradients.keys() == compiled.gradients.keys() == {"weight", "bias", "scale"}
    assert _run(built, built.model, built.model, training=False).gradients == {}


@pytest.mark.slow
def test_attention_is_no_linear() -> None:
    verdict = judge("Bloom", runs=[("inference", "mixed")], backend=Eager)
    assert verdict.problems == []
    found = verdict.coverage
    assert found.refused == {ACTIVATIONS: 4}
    assert found.rewritten == found.linears == found.matmuls - 4
    assert found.share < found.weights_share == 1.0


TENSOR_CORES = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not has_fp8_tensor_cores(torch.device("cuda")), reason="needs a CUDA device of compute capability >= 8.9"
    ),
]


@pytest.mark.zoo
@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize(
    ("device", "executor"), [("cpu", "simulated"), pytest.param("cuda", "scaled_mm", marks=TENSOR_CORES)]
)
def test_by_both_recipes_in_inference_and_training(device: str, executor: str, name: str) -> None:
    verdict = judge(name, device)
    assert verdict.problems == []
    assert verdict.executor == executor
