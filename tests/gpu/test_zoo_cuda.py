"""Some real architectures on tensor cores; all of them by `pytest -m gpu tests/zoo`."""

from __future__ import annotations

import pytest
import torch

from fp8fx.executors.hardware import has_fp8_tensor_cores

pytest.importorskip("transformers", reason="the demo extra is not installed", exc_type=ModuleNotFoundError)

from tests.zoo.judge import judge

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not has_fp8_tensor_cores(torch.device("cuda")), reason="needs a CUDA device of compute capability >= 8.9"
    ),
]


@pytest.mark.parametrize("name", ["GPT-2", "Mixtral-grouped", "T5", "MultiheadAttention"])
def test_on_tensor_cores(name: str) -> None:
    verdict = judge(name, "cuda")
    assert verdict.problems == []
    assert verdict.executor == "scaled_mm"
