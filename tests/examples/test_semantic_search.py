"""The demo on a few passages: real text, real weights."""

from __future__ import annotations

import re

import pytest
import torch

demo = pytest.importorskip(
    "examples.semantic_search", reason="the demo extra is not installed", exc_type=ModuleNotFoundError
)


@pytest.mark.compiles
def test_both_find_the_same(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "LEAST", 0.85)  # one passage of 64 weighs nine times what it does among 560
    demo.main(["--passages", "64"])
    printed = capsys.readouterr().out
    assert "37 of 37 matmuls rewritten, share of the matmul FLOPs: 100.0%" in printed
    assert printed.count("matmul_fp8_mixed") == 37
    for question in demo.QUESTIONS:
        assert re.search(rf"{re.escape(question)}\nfloat32 +fp8\n-+  -+\n(.+\n){{3}}", printed)
    agreement = re.search(r"mixed: ([\d.]+)% of 64 passages", printed)
    assert agreement
    assert 85 <= float(agreement[1]) <= 100


@pytest.mark.slow
def test_disagreement_is_an_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "embed", lambda model, tokenizer, texts, name: torch.randn(len(texts), 8))
    with pytest.raises(SystemExit, match="at least 95% was expected"):
        demo.main(["--passages", "64"])
    demo.main(["--passages", "64", "--recipe", "global"])  # promises nothing
    assert "global: " in capsys.readouterr().out


def test_the_passages_are_many_different_and_long_enough() -> None:
    texts = demo.passages()
    assert len(set(texts)) == len(texts) >= 560
    assert all(demo.LEAST_WORDS <= len(text.split()) <= demo.WORDS for text in texts)
