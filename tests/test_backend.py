"""The torch.compile backend: options, modes, caches, compilations, what Inductor makes of the ops."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
import uuid
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo import config as dynamo_config
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch._inductor import custom_graph_pass
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import run_and_get_code

import fp8fx
from benchmarks.models import LlamaBlock, stack
from fp8fx.backend import fp8
from fp8fx.executors import registry
from fp8fx.lowering import Hook
from fp8fx.passes.inductor import share, store_once
from fp8fx.recipes.recipe import RECIPES

ROOT = Path(__file__).parent.parent


class Attention(nn.Module):
    """Three linears that share a normalized input."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, width, bias=False), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.q(h) * self.k(h) + self.v(h)


class Peek(CustomGraphPass):
    """Inductor's post-grad graphs as counts of ops."""

    def __init__(self) -> None:
        self.graphs: list[Counter[str]] = []

    def __call__(self, graph: fx.Graph) -> None:
        self.graphs.append(Counter(str(n.target) for n in graph.nodes if n.op == "call_function"))

    def uuid(self) -> None:
        return None  # no caching: a cached graph would not pass by here


def run(python: str, cwd: Path) -> str:
    result = subprocess.run([sys.executable, "-c", python], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.compiles
@pytest.mark.parametrize("recipe", ["mixed", "global", "rowwise"])
@pytest.mark.parametrize("train", [False, True])
def test_inductor_sees_through_the_ops_and_quantizes_a_shared_input_once(recipe: str, train: bool) -> None:
    model, x, peek = Attention(), torch.randn(4, 8, 64), Peek()
    compiled = torch.compile(
        model, backend=fp8, fullgraph=True, options={"recipe": recipe, "post_grad_custom_post_pass": peek}
    )
    with torch.set_grad_enabled(train):
        out = compiled(x)
        if train:
            out.sum().backward()
    assert len(peek.graphs) == (2 if train else 1)
    forward = peek.graphs[0]
    assert forward["aten.amax.default"] == 1 + 3  # the input and three weights
    assert not any("fp8fx" in op or "quantize" in op for graph in peek.graphs for op in graph)
    if train:
        # Three gradients, each used by dgrad and wgrad. Per row, wgrad's operands and dgrad's weights have scales of
        # their own.
        assert peek.graphs[1]["aten.amax.default"] == (3 + 3 + 3 + 1 if recipe == "rowwise" else 3)


@pytest.mark.compiles
def test_without_sharing_the_input_would_be_quantized_three_times() -> None:
    peek = Peek()
    compiled = torch.compile(
        fp8fx.convert(Attention()), backend="inductor", options={"post_grad_custom_post_pass": peek}
    )
    with torch.no_grad():
        compiled(torch.randn(4, 8, 64))
    assert peek.graphs[0]["aten.amax.default"] == 6


@pytest.mark.compiles
def test_quantization_is_fused_into_the_norm() -> None:
    with torch.no_grad():
        _, (code,) = run_and_get_code(torch.compile(Attention(), backend=fp8), torch.randn(4, 8, 64))
    fused = [
        line for line in code.splitlines() if "native_layer_norm" in line and "amax" in line and "cpp_fused" in line
    ]
    assert fused, "no kernel computes both the norm and the amax"


@pytest.mark.compiles
def test_a_frozen_block_has_one_kernel_that_only_quantizes() -> None:
    """That of attention's output; tests/gpu/test_backend_cuda.py counts those of a GPU."""
    counts = []
    for depth in (1, 2):
        model = stack(LlamaBlock, depth, device="cpu", width=128, hidden=384, heads=4, kv_heads=2)
        options = {"recipe": "rowwise", "freeze": True}
        with torch.no_grad():
            _, (code,) = run_and_get_code(
                torch.compile(model, backend=fp8, options=options), torch.randn(2, 64, 128).bfloat16()
            )
        kernels = re.findall(r"^ +(cpp_fused_\w+)\(", code, re.MULTILINE)
        alone = [name for name in kernels if "amax" in name and "rsqrt" not in name and "silu" not in name]
        counts.append(
            (len(kernels), code.count("extern_kernels.mm("), sum("amax" in name for name in kernels), len(alone))
        )
    assert counts == [(4 + 1, 4, 4, 1), (8 + 1, 8, 8, 2)]  # and the last residual


@pytest.mark.compiles
@pytest.mark.parametrize("recipe", ["mixed", "global", "rowwise"])
def test_compiled_equals_eager(recipe: str) -> None:
    model, x = Attention(), torch.randn(4, 8, 64, requires_grad=True)
    converted = fp8fx.convert(model, recipe=recipe)
    compiled = torch.compile(model, backend=fp8, fullgraph=True, options={"recipe": recipe})
    grad = torch.randn(4, 8, 64)
    results = []
    for call in (converted, compiled):
        out = call(x)
        results.append([out, *torch.autograd.grad(out, (x, *model.parameters()), grad)])
    for eager, inductor in zip(*results, strict=True):
        torch.testing.assert_close(inductor, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.compiles
def test_dynamic_shapes_without_a_graph_break() -> None:
    model = Attention()
    compiled = torch.compile(model, backend=fp8, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for length in (7, 12):
            x = torch.randn(2, length, 64)
            torch.testing.assert_close(compiled(x), fp8fx.convert(model)(x), rtol=1e-5, atol=1e-5)


@pytest.mark.compiles
def test_the_name_works_without_importing_fp8fx(tmp_path: Path) -> None:
    printed = run(
        "import sys, torch\n"
        "model = torch.nn.Linear(64, 64)\n"
        "assert 'fp8fx' not in sys.modules\n"
        "with torch.no_grad(): out = torch.compile(model, backend='fp8')(torch.randn(4, 64))\n"
        "print('fp8fx' in sys.modules, tuple(out.shape))",
        tmp_path,
    )
    assert printed.split("\n")[-2] == "True (4, 64)"


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"mode": "reduce-overhead"}, {"triton.cudagraphs": True}),
        (
            {"options": {"mode": "max-autotune-no-cudagraphs", "recipe": "global"}},
            {"max_autotune": True, "coordinate_descent_tuning": True},
        ),
        ({"options": {"max_autotune": True, "exclude": "q"}}, {"max_autotune": True}),
        ({"options": {"epilogue-fusion": False}}, {"epilogue_fusion": False}),
    ],
)
def test_modes_and_options_pass_through(
    monkeypatch: pytest.MonkeyPatch, kwargs: dict[str, Any], expected: dict[str, Any]
) -> None:
    seen: dict[str, Any] = {}

    def compile_fx(
        gm: fx.GraphModule, inputs: list[Any], *inner: Any, config_patches: dict[str, Any]
    ) -> Callable[..., Any]:
        seen.update(config_patches)
        return gm.forward

    monkeypatch.setattr("fp8fx.lowering.compile_fx", compile_fx)
    torch.compile(Attention(), backend=fp8, **kwargs)(torch.randn(2, 64))
    hooks = seen.pop("joint_custom_pre_pass"), seen.pop("post_grad_custom_post_pass")
    assert all(isinstance(hook, Hook) for hook in hooks)
    assert seen == expected


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"options": {"recpie": "mixed"}},
            "unknown option 'recpie'; expected one of attention, convolutions, exclude, executor, freeze, include, lay",
        ),
        (
            {"options": {"recipe": "miked"}},
            f"unknown recipe 'miked'; expected one of {', '.join(sorted(RECIPES))}. Did you mean 'mixed'?",
        ),
        (
            {"options": {"executor": "cublas"}},
            f"unknown executor 'cublas'; expected one of {', '.join(sorted(registry.names()))}",
        ),
        ({"options": {"mode": "fast"}}, "unknown mode 'fast'; expected one of default, "),
        ({"options": {"max_autotune": "yes"}}, "Unexpected type of attr max_autotune"),
        ({"options": {"min_features": -1}}, "min_features=-1 is not a feature count"),
        (
            {"options": {"executor": "scaled_mm"}},
            "needs a CUDA device of compute capability 8.9 or higher, found device cpu",
        ),
    ],
)
def test_bad_options_are_typed_errors(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(BackendCompilerFailed) as caught:
        torch.compile(Attention(), backend=fp8, **kwargs)(torch.randn(2, 64))
    assert isinstance(caught.value.inner_exception, fp8fx.FP8Error)
    assert message in str(caught.value.inner_exception)


@pytest.mark.compiles
def test_a_backend_object_takes_a_config_and_keeps_reports() -> None:
    backend = fp8fx.Backend(fp8fx.Config(recipe="global", exclude=("k",)))
    model, x = Attention(), torch.randn(2, 64)
    with torch.no_grad():
        out = torch.compile(model, backend=backend)(x)
        torch.testing.assert_close(out, fp8fx.convert(model, recipe="global", exclude="k")(x), rtol=1e-5, atol=1e-5)
    (report,) = backend.reports
    assert [row.path for row in report.rewritten] == ["q", "v"]
    assert [(row.path, row.reason) for row in report.refused] == [("k", "excluded by 'k'")]
    with pytest.raises(fp8fx.errors.ConfigError, match=r"expected fp8fx\.Config"):
        fp8fx.Backend({"recipe": "global"})  # type: ignore[arg-type]


@pytest.mark.compiles
def test_no_global_setting_changes() -> None:
    before = inductor_config.get_config_copy(), dynamo_config.get_config_copy()
    model, x = Attention(), torch.randn(2, 64)
    fp8fx.explain(model, x)
    torch.compile(model, backend=fp8, options={"mode": "max-autotune-no-cudagraphs"})(x).sum().backward()
    assert (inductor_config.get_config_copy(), dynamo_config.get_config_copy()) == before


@pytest.mark.compiles
def test_nothing_to_rewrite_is_one_warning() -> None:
    compiled = torch.compile(nn.LayerNorm(8), backend=fp8fx.Backend(), dynamic=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled(torch.randn(2, 8))
        compiled(torch.randn(3, 8))
    messages = [str(w.message) for w in caught if w.category is fp8fx.FP8Warning]
    assert messages and all("nothing was rewritten" in m for m in messages)
    assert len(messages) == 1


@pytest.mark.compiles
@pytest.mark.parametrize("kind", ["converted", "modules"])
def test_ops_that_are_there_already_are_compiled_without_a_warning_and_share_quantizations(kind: str) -> None:
    model = Attention().requires_grad_(False)
    if kind == "converted":
        model = fp8fx.convert(model)
    else:
        for name in ("q", "k", "v"):
            setattr(model, name, fp8fx.nn.LinearFP8Mixed.from_linear(getattr(model, name)))
    peek = Peek()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", fp8fx.FP8Warning)
        torch.compile(model, backend="fp8", options={"post_grad_custom_post_pass": peek})(torch.randn(4, 8, 64))
    assert peek.graphs[0]["aten.amax.default"] == 1 + 3


def test_the_compile_cache_key_tells_configurations_apart() -> None:
    ours = [share.run, store_once.run]
    mixed, other = Hook(fp8fx.Config(), ours), Hook(fp8fx.Config(recipe="global"), ours)
    assert mixed.uuid() == Hook(fp8fx.Config(), ours).uuid() != other.uuid()
    # A pass that cannot tell its own version keeps the graph out of the cache.
    assert Hook(fp8fx.Config(), [Peek(), *ours]).uuid() is None
    assert Hook(fp8fx.Config(), [lambda graph: None, *ours]).uuid() is None


@pytest.mark.compiles
def test_the_users_own_joint_pass_still_runs() -> None:
    calls: list[int] = []

    class Own(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            calls.append(len(graph.nodes))

        def uuid(self) -> str:
            return str(uuid.uuid4())  # a graph from the cache would not pass by here

    with torch.no_grad():
        torch.compile(Attention(), backend=fp8, options={"joint_custom_pre_pass": Own()})(torch.randn(2, 64))
    assert len(calls) == 1


@pytest.mark.compiles
@pytest.mark.parametrize("grad", [False, True])
def test_a_pass_that_asks_whether_the_graph_is_for_inference_is_told(grad: bool) -> None:
    aware = getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", None)
    if aware is None:
        pytest.skip("torch 2.11 has no such passes")
    told: list[bool] = []

    class Own(aware):  # type: ignore[misc, valid-type]
        def __call__(self, graph: fx.Graph, is_inference: bool) -> None:
            told.append(is_inference)

        def uuid(self) -> str:
            return str(uuid.uuid4())

    with torch.set_grad_enabled(grad):
        torch.compile(Attention(), backend=fp8, options={"post_grad_custom_post_pass": Own()})(torch.randn(2, 64)).sum()
    assert told == [not grad]


@pytest.mark.compiles
def test_a_copy_of_what_is_compiled_runs_the_same_code() -> None:
    model, x, backend = Attention().eval(), torch.randn(2, 64), fp8fx.Backend()
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        expected, graphs = compiled(x), counters["stats"]["unique_graphs"]
        assert torch.equal(copy.deepcopy(compiled)(x), expected)
    assert counters["stats"]["unique_graphs"] == graphs > 0


class Breaking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


@pytest.mark.slow
def test_explain_sees_every_graph_and_leaves_what_is_compiled_alone() -> None:
    model, x = Breaking(), torch.randn(4, 16)
    count = 0

    def counting(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        nonlocal count
        count += 1
        return gm.forward

    compiled = torch.compile(model, backend=counting)
    compiled(x)
    for _ in range(dynamo_config.recompile_limit + 2):
        report = fp8fx.explain(model, x)
        assert (report.graphs, [row.path for row in report.rewritten]) == (2, ["first", "second"])
    compiled(x)
    assert count == 2


def test_explain_runs_the_model_as_it_is() -> None:
    model, x = Attention(), torch.randn(2, 64)
    expected, seen = model(x), []
    report = fp8fx.explain(lambda x: seen.append(model(x)), x)
    assert torch.equal(seen[0], expected)
    assert len(report.rewritten) == 3
    with pytest.raises(fp8fx.errors.GraphError, match="expected a module or function"):
        fp8fx.explain(3)  # type: ignore[arg-type]


def test_explain_says_that_nothing_was_found() -> None:
    assert "nothing was rewritten: no matmul was seen" in str(fp8fx.explain(nn.LayerNorm(8), torch.randn(2, 8)))


@pytest.mark.compiles
@pytest.mark.parametrize("train", [False, True])
def test_rows_of_various_lengths_are_left_alone(train: bool) -> None:
    model, backend = nn.Sequential(nn.Linear(16, 16), nn.ReLU()), fp8fx.Backend()
    x = torch.nested.nested_tensor([torch.randn(3, 16), torch.randn(5, 16)], layout=torch.jagged, requires_grad=train)
    with torch.set_grad_enabled(train), pytest.warns(fp8fx.FP8Warning, match="nothing was rewritten: 0 of 1 matmuls"):
        out = torch.compile(model, backend=backend)(x)
    torch.testing.assert_close(out.values(), model(x).values())
    if train:
        found, wanted = (
            torch.autograd.grad(y.values().square().sum(), (x, *model.parameters())) for y in (out, model(x))
        )
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a.values() if a.is_nested else a, b.values() if b.is_nested else b)
    (report,) = backend.reports
    assert report.failures == ()
    assert [row.reason for row in report.rows] == ["the input is a NestedTensor, not a plain tensor"]
