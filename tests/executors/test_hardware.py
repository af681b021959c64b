"""Which executor runs on which device."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

from fp8fx.errors import ExecutorError, FP8Error
from fp8fx.executors import hardware
from fp8fx.executors.hardware import has_fp8_tensor_cores
from fp8fx.executors.registry import resolve

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Pretends that the CUDA devices have these capabilities."""

    def pretend(*capabilities: tuple[int, int], current: int = 0, hip: str | None = None) -> None:
        def capability(index: int) -> tuple[int, int]:
            assert capabilities, "torch raises an AssertionError where it has no CUDA"
            return capabilities[index]

        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
        monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
        monkeypatch.setattr(torch.version, "hip", hip)

    import bitsandbytes  # noqa: F401 - it looks for CUDA when it is first imported

    hardware._capability.cache_clear()
    yield pretend
    hardware._capability.cache_clear()


def test_cpu_simulates() -> None:
    assert not has_fp8_tensor_cores(CPU)
    assert resolve("auto", CPU).name == "simulated"


@pytest.mark.parametrize("executor", ["simulated", "bitsandbytes"])
def test_an_executor_asked_for_by_name_is_kept(executor: str, machine: Machine) -> None:
    machine((9, 0))
    assert resolve(executor, CPU).name == executor
    assert resolve(executor, CUDA).name == executor


def test_scaled_mm_on_the_cpu_is_refused() -> None:
    message = (
        "executor 'scaled_mm' needs a CUDA device of compute capability 8.9 or higher, found device cpu; "
        "use executor='simulated' for the same values without tensor cores, or 'auto'"
    )
    with pytest.raises(ExecutorError) as error:
        resolve("scaled_mm", CPU)
    assert str(error.value) == message
    assert isinstance(error.value, FP8Error)
    assert isinstance(error.value, RuntimeError)


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0), (12, 0)])
def test_ada_and_later_have_fp8_tensor_cores(capability: tuple[int, int], machine: Machine) -> None:
    machine(capability)
    assert has_fp8_tensor_cores(CUDA)
    assert resolve("auto", CUDA).name == resolve("scaled_mm", CUDA).name == "scaled_mm"


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6)])
def test_older_devices_have_none(capability: tuple[int, int], machine: Machine) -> None:
    machine(capability)
    assert not has_fp8_tensor_cores(CUDA)
    assert resolve("auto", CUDA).name == "bitsandbytes"
    with pytest.raises(ExecutorError, match=rf"found compute capability {capability[0]}\.{capability[1]};"):
        resolve("scaled_mm", CUDA)


def test_each_device_is_asked_for_itself(machine: Machine) -> None:
    machine((8, 0), (9, 0), current=1)
    assert resolve("auto", torch.device("cuda", 0)).name == "bitsandbytes"
    assert resolve("auto", torch.device("cuda", 1)).name == "scaled_mm"
    assert resolve("auto", CUDA).name == "scaled_mm"  # the current one


def test_a_device_is_asked_once(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine((9, 0))
    calls: list[int] = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: calls.append(index) or (9, 0))
    for _ in range(3):
        resolve("auto", CUDA)
    assert calls == [0]


def test_rocm_simulates(machine: Machine) -> None:
    machine((9, 4), hip="6.4")
    assert not has_fp8_tensor_cores(CUDA)
    assert resolve("auto", CUDA).name == "simulated"


def test_no_cuda_no_tensor_cores(machine: Machine) -> None:
    machine()
    assert not has_fp8_tensor_cores(CUDA)


def test_scaled_mm_without_cuda_is_refused(machine: Machine) -> None:
    machine()
    with pytest.raises(ExecutorError, match="found device cuda"):
        resolve("scaled_mm", CUDA)


def test_the_current_device_is_the_one_that_is_named(machine: Machine) -> None:
    machine((9, 0), (8, 6), current=1)
    with pytest.raises(ExecutorError, match=r"found compute capability 8\.6"):
        resolve("scaled_mm", CUDA)


@pytest.mark.slow
def test_bitsandbytes_operators_are_there_before_a_graph_that_calls_them() -> None:
    resolved = (
        "import sys, torch; from fp8fx.executors.registry import resolve; resolve('bitsandbytes', torch.device('cpu'))"
    )
    code = f"{resolved}; print('bitsandbytes' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "True"
