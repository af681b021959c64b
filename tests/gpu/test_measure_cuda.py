"""Times measured on a device: plausible, kept, and without traces."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fp8fx
from fp8fx.profit import measure, remembered

HAS_TENSOR_CORES = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_TENSOR_CORES, reason="needs a CUDA device of compute capability 8.9 or higher"),
]

DEVICE, BF16 = torch.device("cuda"), torch.bfloat16


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder for the file, and nothing known yet."""
    monkeypatch.setenv("FP8FX_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(remembered, "_figures", {})
    return tmp_path


def measured(kind: str, m: int, k: int, n: int, dtype: torch.dtype = BF16, **others: Any) -> float:
    found = measure.seconds(DEVICE, kind, m, k, n, dtype, **others)
    assert found is not None
    return found


def test_tensor_cores_multiply_fp8_faster() -> None:
    high, tensor, row = (measured(kind, 4096, 4096, 4096) for kind in ("high", "tensor", "row"))
    flops = 2 * 4096**3
    assert 10e12 < flops / high < flops / tensor < 10e15
    assert row < high
    assert tensor <= 1.1 * measured("tensor", 4096, 4096, 4096, exact=True)


def test_a_single_row_takes_as_long_as_its_weight() -> None:
    high, tensor, exact = (measured(kind, 1, 4096, 14336) for kind in ("high", "tensor", "weight_only"))
    assert max(tensor, exact) < 0.8 * high
    rate = measure.bandwidth(DEVICE)
    assert rate is not None and 1e11 < rate < 2e13
    assert 4096 * 14336 / exact < 1.5 * rate  # from memory, not from the L2
    assert 2 * 4096 * 14336 / high < 1.5 * rate


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", [(1, 100, 50), (33, 512, 1000), (300, 17, 4096)], ids=str)
def test_any_dtype_and_sizes(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    for kind in measure.KINDS[: 4 if sizes[0] == 1 else 3]:
        assert 0 < measured(kind, *sizes, dtype) < 1e-3


def test_it_costs_milliseconds() -> None:
    measured("high", 512, 4096, 4096)  # libraries are loaded
    start = time.perf_counter()
    measured("high", 1024, 4096, 4096)
    measured("tensor", 512, 4096, 4096)
    assert time.perf_counter() - start < 1.0


def test_the_file_appears_and_nothing_is_measured_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = measured("tensor", 64, 512, 512), measure.bandwidth(DEVICE)
    (file,) = folder.iterdir()
    assert "H100" not in torch.cuda.get_device_name() or "H100" in file.name
    assert json.loads(file.read_text()) == {"tensor 64x512x512 bfloat16 fast": first[0], "bandwidth": first[1]}
    for name in ("_gemm", "_copy_rate"):
        monkeypatch.setattr(measure, name, lambda *args: pytest.fail("measured again"))
    assert (measured("tensor", 64, 512, 512), measure.bandwidth(DEVICE)) == first
    remembered._figures.clear()
    assert (measured("tensor", 64, 512, 512), measure.bandwidth(DEVICE)) == first


def test_it_leaves_no_traces() -> None:
    def state() -> tuple[Any, ...]:
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.current_device(), torch.is_grad_enabled()

    def everything(m: int) -> None:
        measure.bandwidth(DEVICE)
        for kind in measure.KINDS[: 4 if m == 1 else 3]:
            measured(kind, m, 1024, 1024)

    everything(1)  # the stream's workspaces, which the first GEMM on it takes
    before, cuda, cpu = state(), torch.cuda.get_rng_state(), torch.get_rng_state()
    remembered._figures.clear()
    everything(1)
    everything(40)
    assert state() == before
    assert torch.equal(torch.cuda.get_rng_state(), cuda) and torch.equal(torch.get_rng_state(), cpu)


def test_modes_do_not_matter() -> None:
    with FakeTensorMode(), torch.autocast("cuda", dtype=BF16), torch.device("meta"):
        assert measured("high", 64, 512, 512, torch.float32) > 0
        assert measured("tensor", 64, 512, 512) > 0
    with torch.inference_mode():
        assert measured("row", 64, 512, 512) > 0


def test_nothing_is_measured_while_the_stream_is_capturing() -> None:
    graph, x = torch.cuda.CUDAGraph(), torch.zeros(8, device=DEVICE)
    with torch.cuda.graph(graph):
        x += 1
        assert measure.seconds(DEVICE, "high", 64, 512, 512, BF16) is None
    graph.replay()
    torch.cuda.synchronize()
    assert measured("high", 64, 512, 512) > 0


def test_what_does_not_fit_is_not_measured() -> None:
    before = torch.cuda.memory_allocated()
    assert measure.seconds(DEVICE, "high", 1 << 20, 1 << 20, 16, BF16) is None
    assert torch.cuda.memory_allocated() == before


def test_a_head_is_measured_by_some_of_its_rows() -> None:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    whole, eighth = (measured("high", 16, 4096, rows) for rows in (128256, 16032))
    assert torch.cuda.max_memory_allocated() - before < 300 << 20  # all of it is 1 GB
    assert 0.8 < whole / (8 * eighth) < 1.1


@pytest.mark.parametrize("m", [1, 8192])
def test_a_model_is_decided_by_measured_times(m: int) -> None:
    model = (
        nn.Sequential(nn.Linear(4096, 14336, bias=False), nn.SiLU(), nn.Linear(14336, 4096, bias=False))
        .to(DEVICE, BF16)
        .eval()
    )
    with torch.no_grad():
        report = fp8fx.Backend(fp8fx.Config(recipe="global")).explain(
            model, torch.randn(m, 4096, device=DEVICE, dtype=BF16)
        )
    texts = [row.remark or row.reason or "" for row in report.rows]
    assert len(report.rewritten) == (0 if m == 1 else 2)
    assert all(
        text.startswith("FP8 is not worth it, measured: forward 0." if m == 1 else "measured: forward 1.")
        for text in texts
    )
