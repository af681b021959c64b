"""Frozen diffusers models: equal blocks share a graph, and compute what they compute eagerly."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before diffusers is imported: nothing is downloaded

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import fp8fx
from fp8fx import FP8Weight
from fp8fx.errors import FreezeError
from tests.support.numbers import error

diffusers = pytest.importorskip("diffusers", reason="the test extra is not installed")

pytestmark = pytest.mark.slow


def flux(double: int = 2, single: int = 2) -> Any:
    torch.manual_seed(0)
    sizes = {"in_channels": 4, "num_layers": double, "num_single_layers": single, "attention_head_dim": 16}
    widths = {"joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8)}
    model = diffusers.FluxTransformer2DModel(num_attention_heads=2, **sizes, **widths)
    return model.eval().requires_grad_(False)


def sample_of(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    image, text, pooled = (torch.randn(size, generator=generator) for size in ((1, 16, 4), (1, 8, 32), (1, 32)))
    places = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(8, 3)}
    given = {"hidden_states": image, "encoder_hidden_states": text, "pooled_projections": pooled, **places}
    with torch.no_grad():
        sample: Tensor = model(timestep=torch.ones(1), **given).sample
    return sample


def graphs_of(model: Any, backend: Any) -> int:
    """How many graphs it takes to compile the repeated blocks."""
    torch._dynamo.reset()
    counters.clear()
    model.compile_repeated_blocks(fullgraph=True, backend=backend)
    sample_of(model)
    count: int = counters["stats"]["unique_graphs"]
    return count


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our backend's graphs run as they are."""
    monkeypatch.setattr("fp8fx.lowering.compile_fx", lambda gm, inputs, *inner, config_patches: gm.forward)


def test_eagerly() -> None:
    model = flux()
    expected = sample_of(model)
    report = fp8fx.freeze(model)
    assert {row.name for row in report.rewritten} >= {"x_embedder.weight", "transformer_blocks.1.attn.to_q.weight"}
    assert not any(x.dim() == 2 and not isinstance(x, FP8Weight) for x in model.parameters())
    assert 1e-3 < error(sample_of(model), expected) < 0.1


@pytest.mark.usefixtures("without_inductor")
def test_equal_blocks_share_a_graph() -> None:
    in_high_precision = graphs_of(flux(), "eager")
    model = flux()
    fp8fx.freeze(model)
    expected = sample_of(model)
    backend = fp8fx.Backend(fp8fx.Config(recipe="rowwise"))
    assert graphs_of(model, backend) == in_high_precision == len(backend.reports)
    assert torch.equal(sample_of(model), expected)
    assert all(report.refused == () for report in backend.reports)


@pytest.mark.usefixtures("without_inductor")
def test_the_whole_model_in_one_graph() -> None:
    model = flux(double=1, single=1)
    fp8fx.freeze(model)
    expected = sample_of(model)
    counters.clear()
    model.compile(backend="fp8", fullgraph=True)
    assert torch.equal(sample_of(model), expected)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.compiles
def test_by_inductor() -> None:
    in_high_precision = graphs_of(flux(double=0), "eager")  # as many as by Inductor: Dynamo makes them
    model = flux(double=0)
    fp8fx.freeze(model)
    expected = sample_of(model)
    assert graphs_of(model, "fp8") == in_high_precision
    assert error(sample_of(model), expected) < 1e-2


def test_save_pretrained_is_refused(tmp_path: Path) -> None:
    model = flux()
    fp8fx.freeze(model)
    with pytest.raises(FreezeError, match=r"save model\.state_dict\(\) by safetensors"):
        model.save_pretrained(tmp_path)
    other = flux()
    fp8fx.freeze(other)
    other.load_state_dict(model.state_dict())
    assert torch.equal(sample_of(other), sample_of(model))
