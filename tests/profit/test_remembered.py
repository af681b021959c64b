"""What is remembered of measured times: by the process, in a file, and what stands in the way.

The device is a stand-in.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from fp8fx.profit import measure, remembered
from tests.support.figures import BF16, DEVICE, Timer, ask, file, forget


def test_another_process_reads_what_this_one_measured(timer: Timer) -> None:
    before = [ask(8), ask(16)]
    forget()
    assert [ask(8), ask(16)] == before
    assert len(timer.asked) == 2
    assert json.loads(file().read_text()) == {
        "tensor 8x64x32 bfloat16 fast": 1e-6,
        "tensor 16x64x32 bfloat16 fast": 2e-6,
    }
    assert list(file().parent.iterdir()) == [file()]  # nothing temporary is left


KEY = "tensor 8x64x32 bfloat16 fast"
CORRUPT = [b"", b"{", b"[1.0]", b"3", b"\xff\xfe"]
CORRUPT += [f'{{"{KEY}": {figure}}}'.encode() for figure in ('"fast"', "-1.0", "NaN", "Infinity", "null")]


@pytest.mark.parametrize("content", CORRUPT)
def test_a_corrupt_file_is_measured_anew(content: bytes, timer: Timer) -> None:
    file().parent.mkdir()
    file().write_bytes(content)
    assert ask() == 1e-6
    forget()
    assert ask() == 1e-6
    assert len(timer.asked) == 1


def test_a_folder_that_cannot_be_written_is_no_error(
    timer: Timer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FP8FX_CACHE_DIR", str(tmp_path / "file"))
    assert [ask(), ask()] == [1e-6, 1e-6]
    assert (tmp_path / "file").read_text() == ""


def test_a_write_that_fails_leaves_the_file_as_it_was(timer: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    ask()

    def fails(*args: Any) -> None:
        raise OSError("the disk is full")

    before = file().read_text()
    monkeypatch.setattr("os.replace", fails)
    assert ask(16) == 2e-6
    assert file().read_text() == before
    assert list(file().parent.iterdir()) == [file()]


def test_the_entries_of_two_processes_merge(timer: Timer) -> None:
    ask(8)
    file().write_text(
        json.dumps({"tensor 8x64x32 bfloat16 fast": 9e-6, "tensor 16x64x32 bfloat16 fast": 5e-6})
    )  # by another
    assert ask(16) == 5e-6  # measured by the other
    assert ask(8) == 1e-6  # no figure changes while the process runs
    assert ask(32) == 2e-6
    assert json.loads(file().read_text()) == {
        "tensor 8x64x32 bfloat16 fast": 9e-6,
        "tensor 16x64x32 bfloat16 fast": 5e-6,
        "tensor 32x64x32 bfloat16 fast": 2e-6,
    }


def test_the_file_is_the_devices_and_the_versions(timer: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [file().name]
    assert names[0].startswith("Some_GPU__80GB_-9.0-torch")
    changes: list[tuple[Any, str, Any]] = [
        (torch, "__version__", "99.0"),
        (torch.version, "cuda", "99.0"),
        (remembered, "_version", lambda package: "99.0" if package == "fp8fx" else "0"),
        (remembered, "_version", lambda package: "99.0" if package == "triton" else "0"),
        (remembered, "_SCHEMA", 99),
        (torch.cuda, "get_device_name", lambda device: "Another GPU"),
        (torch.cuda, "get_device_capability", lambda device: (99, 0)),
    ]
    ask()
    for place, name, new in changes:
        with monkeypatch.context() as patch:
            patch.setattr(place, name, new)
            names.append(file().name)
            ask()
    assert len(set(names)) == len(names) == len(timer.asked)
    ask()
    assert len(timer.asked) == len(names)


def test_where_the_file_lies(timer: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("HOME", "/home/someone")
    assert file().parent.name == "cache"
    monkeypatch.setenv("FP8FX_CACHE_DIR", "")
    assert file().parent == Path("/xdg/fp8fx")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert file().parent == Path("/home/someone/.cache/fp8fx")


def test_without_a_home_it_is_measured_and_not_kept(timer: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("FP8FX_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    assert remembered._file(DEVICE) is None
    assert [ask(), ask()] == [1e-6, 1e-6]


# What stands in the way.


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no memory"), MemoryError(), RuntimeError("?"), ImportError("triton")], ids=repr
)
def test_a_failure_is_no_figure_and_not_tried_again(error: Exception, timer: Timer) -> None:
    timer.error = error
    assert [ask(), ask()] == [None, None]
    assert len(timer.asked) == 1
    assert not file().exists()
    timer.error = None
    assert ask(16) == 2e-6
    forget()
    assert ask() == 3e-6  # a new process tries


def test_an_interrupt_is_not_swallowed(timer: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(measure, "_gemm", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ask()
    assert ask() == 1e-6


def test_nothing_is_measured_while_a_stream_is_capturing(timer: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(16)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert (ask(), ask(16)) == (None, 1e-6)
    assert len(timer.asked) == 1
    assert ask() == 2e-6


def test_threads_measure_once(timer: Timer) -> None:
    barrier = threading.Barrier(4)
    found: list[float | None] = []

    def work() -> None:
        barrier.wait()
        found.append(ask())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (found, len(timer.asked)) == ([1e-6] * 4, 1)


def test_without_a_file_each_device_has_figures_of_its_own(timer: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "_file", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    found = [measure.seconds(torch.device("cuda", index), "tensor", 8, 64, 32, BF16) for index in (0, 1, 0)]
    assert found == [1e-6, 2e-6, 1e-6]
