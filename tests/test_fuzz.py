"""A few graphs of the fuzzer, the same ones each time; and that it notices what it is to notice."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fp8fx.convert import convert
from tests import fuzz


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(0, 30, 5))
def test_five_graphs(seed: int) -> None:
    failed = [failure for number in range(seed, seed + 5) if (failure := fuzz.attempt(number, "aot_eager")[1])]
    assert not failed, "\n".join(failed)


def test_a_seed_is_one_program() -> None:
    assert fuzz.write(7) == fuzz.write(7) != fuzz.write(8)


def _other_recipe(gm: Any, inputs: Any = None, config: Any = None, **options: Any) -> Any:
    return convert(gm, inputs, config, recipe="rowwise" if config.recipe != "rowwise" else "global", **options)


def _nothing(gm: Any, inputs: Any = None, config: Any = None, **_: Any) -> Any:
    return convert(gm, inputs, config, profit="never")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("wrong", "message"), [(_other_recipe, "differs"), (_nothing, "0 of")])
def test_it_notices(wrong: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "convert", wrong)
    seed = next(seed for seed in range(100) if (program := fuzz.write(seed)).traceable and program.lines[0].rewritten)
    done, failure = fuzz.attempt(seed, "none")
    assert done == ["failed"]
    assert message in failure
    assert f"seed {seed}\n" in failure


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["fuzz", "--graphs", "1", "--seed", "1", "--compile", "none"])
    assert fuzz.main() == 0
    assert "'graphs': 1" in capsys.readouterr().out
    monkeypatch.setattr(fuzz, "check", lambda program, compiler: 1 / 0)
    assert fuzz.main() == 1
    assert "class Model(nn.Module):  # seed 1;" in capsys.readouterr().out


def test_a_product_further_off_than_fp8_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.randn(3, 16), torch.randn(16, 5)
    fuzz.bounded("mixed")(a, b)
    monkeypatch.setattr(fuzz, "fp8", lambda recipe: lambda a, b, bias: 1.2 * (a @ b))
    with pytest.raises(fuzz.DisagreementError, match="further from the exact one"):
        fuzz.bounded("mixed")(a, b)
