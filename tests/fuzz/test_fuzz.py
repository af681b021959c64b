"""A few graphs of the fuzzer, the same ones each time; and that it notices what it is to notice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fp8fx
from fp8fx.convert import convert
from fp8fx.ops.fp8_weight import FP8Weight
from fp8fx.weights.converted_module import FrozenModule
from tests.fuzz import fuzzer
from tests.support import agreement
from tests.support.agreement import DisagreementError, Run, demand_close
from tests.support.programs import Program


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(0, 30, 5))
def test_five_graphs(seed: int) -> None:
    failed = [failure for number in range(seed, seed + 5) if (failure := fuzzer.attempt(number, "aot_eager")[1])]
    assert not failed, "\n".join(failed)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", [700120, 702358, 702851, 703189, 704281])
def test_what_it_found(seed: int) -> None:
    assert not fuzzer.attempt(seed, "aot_eager")[1]


def test_a_seed_is_one_program() -> None:
    assert fuzzer.write(7) == fuzzer.write(7) != fuzzer.write(8)


HAS: dict[str, Callable[[Program], Any]] = {
    "autocast": lambda program: program.around or any(line.inside for line in program.lines),
    "dynamic": lambda program: program.sizes,
    "freeze": lambda program: sum(line.rewritten for line in program.lines) > 1,
    "grouped": lambda program: any("offs=" in line.by_hand for line in program.lines),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("feature", fuzzer.FEATURES)
def test_each_feature(feature: str) -> None:
    seeds = [seed for seed in range(99) if HAS[feature](fuzzer.write(seed, [feature]))][:4]
    failed = [failure for seed in seeds if (failure := fuzzer.attempt(seed, "aot_eager", features=[feature])[1])]
    assert len(seeds) == 4
    assert not failed, "\n".join(failed)
    assert (
        not any(HAS[feature](fuzzer.write(seed, ())) for seed in seeds) or feature == "freeze"
    )  # a matter of the check


@dataclass
class Planted:
    """What a wrong convert gives: the right graph, called wrongly."""

    gm: Any
    wrong: Callable[..., Any]

    @property
    def meta(self) -> Any:
        return self.gm.meta

    def __call__(self, *xs: Tensor) -> Any:
        return self.wrong(self.gm, *xs)


def _other_recipe(gm: Any, inputs: Any = None, config: Any = None, **options: Any) -> Any:
    return convert(gm, inputs, config, recipe="rowwise" if config.recipe != "rowwise" else "global", **options)


def _nothing(gm: Any, inputs: Any = None, config: Any = None, **_: Any) -> Any:
    return convert(gm, inputs, config, profit="never")


def _without_autocast(gm: Any, inputs: Any = None, config: Any = None, **options: Any) -> Any:
    def call(new: Any, *xs: Tensor) -> Any:
        with torch.autocast("cpu", enabled=False):
            return new(*xs)

    return Planted(convert(gm, inputs, config, **options), call)


def _for_one_size(gm: Any, inputs: Any = None, config: Any = None, **options: Any) -> Any:
    def call(new: Any, *xs: Tensor) -> Any:
        pinned = [x if x.shape == y.shape else x * 1.5 for x, y in zip(xs, inputs, strict=True)]
        return new(*pinned)

    return Planted(convert(gm, inputs, config, **options), call)


def _half_a_scale(gm: Any, inputs: Any = None, config: Any = None, **options: Any) -> Any:
    new = convert(gm, inputs, config, **options)
    for x in new.parameters():
        if isinstance(x, FP8Weight):
            x.scale.mul_(0.5)
    return new


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("feature", "wrong", "message"),
    [
        (None, _other_recipe, "convert: "),
        (None, _nothing, "0 of"),
        ("autocast", _without_autocast, "Error: "),
        ("dynamic", _for_one_size, "convert, {'n"),
        ("freeze", _half_a_scale, "frozen: output"),
        ("grouped", _other_recipe, "convert: "),
    ],
)
def test_it_notices(feature: str | None, wrong: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    features = [feature] if feature else []
    monkeypatch.setattr(fuzzer, "convert", wrong)
    found = ""
    for seed in range(200):
        program = fuzzer.write(seed, features)
        if program.traceable and program.lines[0].rewritten and (feature is None or HAS[feature](program)):
            done, failure = fuzzer.attempt(seed, "none", features=features)
            if message in failure:
                found = failure
                break
            assert "Error" not in failure
    assert f"seed {seed}\n" in found
    assert done == ["failed"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_it_notices_more_compilations_and_weights_that_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def failures(feature: str, compiler: str) -> Iterator[str]:
        for seed in range(200):
            if HAS[feature](program := fuzzer.write(seed, [feature])) and program.traceable:
                yield fuzzer.attempt(seed, compiler, features=[feature])[1]

    monkeypatch.setattr(fuzzer, "_compiles", lambda case, *sizes: 0)
    assert any("without the rewrite 0" in failure for failure in failures("dynamic", "aot_eager"))
    monkeypatch.setattr(FrozenModule, "load_state_dict", lambda model, state_dict: None)
    assert any("reloaded: output" in failure for failure in failures("freeze", "none"))


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["fuzz", "--graphs", "1", "--seed", "1", "--compile", "none"])
    assert fuzzer.main() == 0
    assert "'graphs': 1" in capsys.readouterr().out
    monkeypatch.setattr(fuzzer, "check", lambda *_: 1 / 0)
    assert fuzzer.main() == 1
    assert "class Model(nn.Module):  # seed 1;" in capsys.readouterr().out


def test_a_product_further_off_than_fp8_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.randn(3, 16), torch.randn(16, 5)
    agreement.Bounded("mixed")(a, b)
    monkeypatch.setattr(agreement, "fp8", lambda recipe: lambda a, b, bias: 1.2 * (a @ b))
    with pytest.raises(fuzzer.DisagreementError, match="further from the exact one"):
        agreement.Bounded("mixed")(a, b)


def test_a_group_is_held_to_its_own_expert() -> None:
    a, b, offs = (
        torch.randn(9, 32).bfloat16(),
        torch.randn(2, 32, 16).bfloat16(),
        torch.tensor([4, 9], dtype=torch.int32),
    )
    mm = agreement.Bounded("mixed")
    mm(a, b, offs=offs)
    mm.mm = lambda a, b, offs: fp8fx.ops.grouped_mm.op("mixed")(a, b.flip(0), offs)
    with pytest.raises(fuzzer.DisagreementError, match="further from the exact one"):
        mm(a, b, offs=offs)


def _report(*names: str) -> Any:
    remarks = [f"one GEMM with {', '.join(other for other in names if other != name)}" for name in names]
    rows = [replace(_ROW, name=name, remark=remark) for name, remark in zip(names, remarks, strict=True)]
    return fp8fx.Report(tuple(rows))


_ROW = fp8fx.Backend().explain(torch.nn.Linear(2, 2), torch.randn(1, 2)).rows[0]


def test_siblings_side_by_side() -> None:
    weights, bias = [torch.randn(8, n) for n in (3, 5)], torch.randn(5)
    found = agreement.merged(_report("q", "k"), [(weights[0], None), (weights[1], bias)], "global")
    assert found is not None
    assert [merged.start for merged in found.values()] == [0, 3]
    assert all(torch.equal(merged.weight, torch.cat(weights, 1)) for merged in found.values())
    assert all(torch.equal(merged.bias, torch.cat([torch.zeros(3), bias])) for merged in found.values())
    assert agreement.merged(_report("q", "k"), [(weights[0], None)], "global") is None
    with pytest.raises(fuzzer.DisagreementError, match="share a scale"):
        agreement.merged(_report("q", "k"), [(weights[0] * 1000, None), (weights[1], None)], "global")


def test_a_result_that_nearly_cancels_is_held_to_what_a_last_place_makes_of_it() -> None:
    def result(*values: float) -> Run:
        return Run({"output 0": torch.tensor(values)})

    expected, nudged = result(0.002, 0.001), result(0.003, 0.001)
    demand_close("", expected, result(0.004, 0.001), 20, nudged)
    for found, by in ((result(0.004, 0.001), None), (result(0.008, 0.001), nudged), (result(0.004, 0.001), expected)):
        with pytest.raises(DisagreementError, match="an SQNR of"):
            demand_close("", expected, found, 20, by)
