"""The store of measured times: what is measured, once, what is kept, and what stands in the way.

The device is a stand-in.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fp8fx.errors import ConfigError
from fp8fx.executors import scaled_mm
from fp8fx.profit import measure
from fp8fx.recipes.quantize import Quantized
from tests.support.figures import BF16, DEVICE, FP32, Timer, ask, forget

# What is measured.


def test_a_gemm_is_measured_once(timer: Timer) -> None:
    assert [ask(), ask(), ask(16), ask()] == [1e-6, 1e-6, 2e-6, 1e-6]
    assert timer.asked == [("tensor", 8, 64, 32, BF16, True), ("tensor", 16, 64, 32, BF16, True)]


def test_each_argument_tells_gemms_apart(timer: Timer) -> None:
    base = (DEVICE, "tensor", 32, 64, 48, BF16)
    others: list[tuple[Any, ...]] = [
        (DEVICE, "row", *base[2:]),
        (DEVICE, "high", *base[2:]),
        (*base[:2], 16, 64, 48, BF16),
        (*base[:2], 32, 48, 64, BF16),
        (*base[:2], 32, 64, 64, BF16),
        (*base[:5], torch.float16),
    ]
    values = [measure.seconds(*each) for each in (base, *others)] + [measure.seconds(*base, exact=True)]
    assert len(set(values)) == len(values) == len(timer.asked)


@pytest.mark.parametrize(("kind", "dtype", "exact", "fast"), [
    ("tensor", BF16, False, True),
    ("row", BF16, False, True),
    ("tensor", BF16, True, False),
    ("tensor", torch.float16, False, False),
    ("row", FP32, False, False),
    ("high", BF16, False, False),
])  # fmt: skip
def test_accumulation_is_as_fast_as_the_ops_have_it(
    kind: str, dtype: torch.dtype, exact: bool, fast: bool, timer: Timer
) -> None:
    measure.seconds(DEVICE, kind, 8, 64, 32, dtype, exact=exact)
    assert timer.asked[-1][-1] is fast


def test_fp8_is_measured_as_it_is_padded(timer: Timer) -> None:
    for kind in ("tensor", "row", "high", "weight_only"):
        measure.seconds(DEVICE, kind, 1, 100, 50, BF16)
    assert [asked[:4] for asked in timer.asked] == [
        ("tensor", 1, 112, 64),
        ("row", 1, 112, 64),
        ("high", 1, 100, 50),
        ("weight_only", 1, 100, 50),
    ]
    measure.seconds(DEVICE, "tensor", 1, 112, 64, BF16)
    assert len(timer.asked) == 4


def test_tf32_is_another_gemm_of_float32_alone(timer: Timer) -> None:
    def both() -> list[float | None]:
        return [measure.seconds(DEVICE, "high", 8, 64, 32, dtype) for dtype in (FP32, BF16)]

    torch.backends.cuda.matmul.allow_tf32 = False
    assert both() == [1e-6, 2e-6]
    torch.backends.cuda.matmul.allow_tf32 = True
    assert both() == [3e-6, 2e-6]


def test_tf32_asked_for_in_torch_s_newer_way(timer: Timer) -> None:
    def single() -> float | None:
        return measure.seconds(DEVICE, "high", 8, 64, 32, FP32)

    assert single() == 1e-6
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    with pytest.raises(RuntimeError, match="allow_tf32"):
        bool(torch.backends.cuda.matmul.allow_tf32)
    assert single() == 2e-6


@pytest.mark.parametrize(
    "asked", [("tensor", 0, 64, 32), ("high", 8, 0, 32), ("row", 8, 64, 0), ("weight_only", 2, 64, 32)], ids=str
)
def test_what_is_not_there_is_not_measured(asked: tuple[Any, ...], timer: Timer) -> None:
    assert measure.seconds(DEVICE, *asked, BF16) is None
    assert timer.asked == []


def test_an_unknown_kind_is_refused(timer: Timer) -> None:
    with pytest.raises(
        ConfigError, match=r"unknown kind 'rows'; expected one of high, row, tensor, weight_only\. Did you mean 'row'\?"
    ):
        ask(kind="rows")


def test_the_bandwidth_is_measured_once(timer: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter([2.5e12])
    monkeypatch.setattr(measure, "_copy_rate", lambda device: next(rates))
    assert [measure.bandwidth(DEVICE), measure.bandwidth(DEVICE)] == [2.5e12, 2.5e12]
    forget()
    assert measure.bandwidth(DEVICE) == 2.5e12


# What is kept.


@pytest.mark.parametrize(
    ("free", "reserved", "fits"), [(16 << 20, 0, True), ((16 << 20) - 1, 0, False), (8 << 20, 8 << 20, True)]
)
def test_a_sixteenth_of_the_free_memory_is_the_most(
    free: int, reserved: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved + 1000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000)
    with contextlib.nullcontext() if fits else pytest.raises(MemoryError):
        measure._check_memory(DEVICE, 1 << 20)


@pytest.mark.parametrize(("kind", "k", "n", "copies"), [
    ("tensor", 4096, 4096, 4),
    ("high", 4096, 4096, 2),
    ("tensor", 4096, 28672, 2),
    ("row", 4096, 1024, 16),
    ("tensor", 16, 16, 64),
])  # fmt: skip
def test_copies_of_the_weight_are_more_than_the_cache_holds(
    kind: str, k: int, n: int, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(measure, "_check_memory", lambda device, needed: asked.append(needed))
    monkeypatch.setattr(measure, "_calls", lambda *args: [args[-1]])
    monkeypatch.setattr(measure, "_time", lambda calls: calls[0])
    assert measure._gemm(DEVICE, kind, 8, k, n, BF16, False) == copies
    assert asked[0] >= copies * k * n * (2 if kind == "high" else 1)


@pytest.mark.parametrize("kind", ["high", "tensor"])
def test_a_heads_time_is_that_of_a_part_of_its_rows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(measure, "_check_memory", lambda device, needed: asked.append(needed))
    monkeypatch.setattr(measure, "_calls", lambda device, kind, m, k, n, *others: [n])
    monkeypatch.setattr(measure, "_time", lambda calls: 1e-6 * calls[0])
    assert measure._gemm(DEVICE, kind, 8, 4096, 128250, BF16, False) == pytest.approx(1e-6 * 128250)
    assert asked[0] < 3 * 256 << 20


# Timing.


class Batches:
    """In the place of `_batch`: a host that needs `lead` cycles a call, and a device that needs the given seconds a
    call, in turn."""

    def __init__(self, seconds: Sequence[float], lead: int = 0) -> None:
        self.seconds, self.lead = list(seconds), lead
        self.sizes: list[int] = []

    def __call__(self, calls: Sequence[Callable[[], object]], ahead: int) -> tuple[float, bool]:
        for call in calls:
            call()
        self.sizes.append(len(calls))
        ready = ahead >= self.lead * len(calls)
        one = self.seconds[min(len(self.sizes) - 1, len(self.seconds) - 1)] if ready else 1.0
        return one * len(calls), ready


def timed(monkeypatch: pytest.MonkeyPatch, batches: Batches, copies: int = 3) -> tuple[float, list[int]]:
    order: list[int] = []
    monkeypatch.setattr(measure, "_batch", batches)
    return measure._time([lambda i=i: order.append(i) for i in range(copies)]), order  # type: ignore[misc]


def test_the_time_is_the_least_of_batches_of_calls_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = Batches([50e-6, 9e-6, 11e-6, 10e-6, 10e-6, 90e-6])
    found, order = timed(monkeypatch, batches)
    assert found == pytest.approx(9e-6)
    assert batches.sizes == [1, 8, 8, 8, 8, 8]  # 0.4 ms, by the first
    assert order == [i % 3 for i in range(2 + 5 * 8)]


def test_a_long_call_is_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = Batches([3e-3])
    assert timed(monkeypatch, batches)[0] == 3e-3
    assert set(batches.sizes) == {1}


def test_a_batch_that_waited_for_the_host_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = Batches([10e-6], lead=100_000)
    assert timed(monkeypatch, batches)[0] == pytest.approx(10e-6)
    assert batches.sizes == [1, 40] + [40] * 5  # 2^20 cycles were too few, 2^22 are enough


def test_a_host_that_never_keeps_up_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="cannot keep the device busy"):
        timed(monkeypatch, Batches([10e-6], lead=1 << 29))


# The GEMMs that are timed, on the CPU.


@pytest.mark.parametrize("fast", [False, True], ids=["exact", "fast"])
@pytest.mark.parametrize("dtype", [BF16, torch.float16, FP32], ids=str)
@pytest.mark.parametrize(("kind", "m"), [("tensor", 5), ("tensor", 65), ("row", 64), ("row", 65)])
def test_what_runs_on_tensor_cores(
    kind: str, m: int, dtype: torch.dtype, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr(scaled_mm, "_SMALL", 65 * 48 - 1)
    by_row = (kind, m) == ("row", 65)
    expected = FP32 if (kind, m) == ("row", 64) else dtype

    def nan_placeholder(
        a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, *, out_dtype: torch.dtype, use_fast_accum: bool
    ) -> Tensor:
        assert (a.dtype, b.dtype, out_dtype, use_fast_accum) == (
            torch.float8_e4m3fn,
            torch.float8_e4m3fn,
            expected,
            fast,
        )
        assert (a.shape, a.stride(), b.shape, b.stride()) == ((m, 64), (64, 1), (64, 48), (1, 64))
        assert (scale_a.shape, scale_b.shape) == (((m, 1), (1, 48)) if by_row else ((), ()))
        assert scale_a.dtype == scale_b.dtype == FP32
        seen.append(b)
        return a.new_empty(m, 48, dtype=out_dtype)

    monkeypatch.setattr(measure, "scaled_mm", nan_placeholder)
    for call in measure._calls(torch.device("cpu"), kind, m, 64, 48, dtype, fast, 3):
        call()
    assert len({x.data_ptr() for x in seen}) == 3
    assert all((x.float() != 0).float().mean() > 0.9 and x.float().isfinite().all() for x in seen)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_what_runs_in_high_precision(dtype: torch.dtype) -> None:
    results = [call() for call in measure._calls(torch.device("cpu"), "high", 5, 64, 48, dtype, False, 2)]
    assert [(x.shape, x.dtype) for x in results] == [((5, 48), dtype)] * 2
    assert torch.equal(*results)


def test_a_row_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def nan_placeholder(x: Tensor, weight: Quantized) -> Tensor:
        assert (x.shape, x.dtype, weight.data.shape, weight.data.dtype) == (
            (1, 64),
            BF16,
            (48, 64),
            torch.float8_e4m3fn,
        )
        assert weight.scale is not None and weight.scale.shape == ()
        return x

    monkeypatch.setattr(measure.weight_only, "matmul", nan_placeholder)
    assert len([call() for call in measure._calls(torch.device("cpu"), "weight_only", 1, 64, 48, BF16, False, 2)]) == 2


def test_the_users_random_numbers_stay() -> None:
    state = torch.get_rng_state()
    measure._calls(torch.device("cpu"), "tensor", 5, 64, 48, BF16, True, 2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def _no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())


@pytest.mark.usefixtures("_no_device")
def test_modes_grad_and_autocast_are_left_outside() -> None:
    weight = torch.randn(3, 3, requires_grad=True)
    with FakeTensorMode(), torch.autocast("cpu", dtype=BF16):
        with measure._aside(DEVICE):
            x = torch.ones(3)
            assert type(x) is Tensor and not isinstance(x, FakeTensor)
            assert not (weight @ x).requires_grad
        assert isinstance(torch.ones(3), FakeTensor)
        assert torch.is_grad_enabled()


@pytest.mark.usefixtures("_no_device")
def test_nothing_of_it_is_traced() -> None:
    def f(x: Tensor) -> Tensor:
        with measure._aside(DEVICE):
            assert math.isclose(float(torch.ones(4).sum()), 4)
        return x + 1

    traced = make_fx(f, tracing_mode="fake")(torch.ones(2))
    assert [n.target for n in traced.graph.nodes if n.op == "call_function"] == [torch.ops.aten.add.Tensor]
