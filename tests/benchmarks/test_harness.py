"""Contenders run in processes of their own, one after another, and measure alone also when they compile together."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.harness import contend

CONTENDER = """
import json, sys, time
from pathlib import Path

_, _, case, name = sys.argv
log = Path(case)
if name == "slow":
    time.sleep(600)
if name == "quick":  # which imports no torch: as await_turn does
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps({"name": name}))
    sys.exit()
from benchmarks.harness import await_turn

def note(what):
    with log.open("a") as file:
        file.write(f"{what} {name}\\n")

print("noise before")
note("compiles")
if name == "broken":
    raise ValueError("no such kernel")
await_turn()
note("starts")
time.sleep(0.2)
note("ends")
print("noise after")
print(json.dumps({"name": name}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("together", [1, 3])
def test_each_measures_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: int) -> None:
    (tmp_path / "contender.py").write_text(CONTENDER)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path.cwd()}")
    log = tmp_path / "log"
    ((case, found),) = contend("contender", [(str(log), name) for name in ("one", "broken", "two")], together)
    assert case == str(log)
    assert found == {"one": {"name": "one"}, "broken": {"error": "ValueError: no such kernel"}, "two": {"name": "two"}}
    lines = log.read_text().splitlines()
    measured = [line for line in lines if not line.startswith("compiles")]
    assert measured == ["starts one", "ends one", "starts two", "ends two"]
    assert (set(lines[:3]) == {"compiles one", "compiles broken", "compiles two"}) == (together == 3)


@pytest.mark.slow
def test_a_case_is_there_before_the_next_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "contender.py").write_text(CONTENDER)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path.cwd()}")
    first, second = tmp_path / "first", tmp_path / "second"
    found = contend("contender", [(str(first), "one"), (str(second), "two")])
    assert next(found) == (str(first), {"one": {"name": "one"}})
    assert not second.exists()
    assert capsys.readouterr().err == f'{first}, one: {{"name": "one"}}\n'
    assert list(found) == [(str(second), {"two": {"name": "two"}})]


@pytest.mark.slow
def test_one_that_takes_too_long_to_compile_is_ended_and_the_others_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "contender.py").write_text(CONTENDER)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path.cwd()}")
    ((_, found),) = contend("contender", [("case", name) for name in ("slow", "quick")], 2, patience=5)
    assert found == {"slow": {"error": "had not compiled after 5 s"}, "quick": {"name": "quick"}}
