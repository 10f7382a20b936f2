"""benchmarks/adaptation.py on a tiny target: rounds are told by where they begin, and what is decoded is kept."""

from __future__ import annotations

import json

import pytest

from benchmarks import adaptation
from deepspec.target.model import load_target
from tests.drafting import make, write


def test_rounds_are_counted_by_where_they_begin():
    """They begin at 0, 3, 4 and 8; the last reaches beyond the end."""
    assert adaptation.along([2, 0, 3, 5], [0, 4, 8]).tolist() == [[4, 2], [10, 2]]


def test_both_drafts_decode_every_prompt_once(tiny_target, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    target = load_target(tiny_target)
    write(make("dspark", target), target, tmp_path / "draft")
    flags = ["--target", str(tiny_target), "--draft", "draft", "--prompts", "word_problems", "--count", "3"]
    flags += ["--tokens", "60", "--every", "8", "--blocks", "8", "--lr", "0.01", "--output", "out"]
    assert adaptation.main(flags) == 0
    found = json.loads((tmp_path / "out/adaptation.json").read_text())
    assert found["settings"] == {"every": 8, "blocks": 8, "context": 512, "lr": 0.01}
    for temperature in (0, 1):
        parts = [f"T={temperature} {part}" for part in ("0–15", "15–30", "30–45", "45–60", "all")]
        assert all(found[part]["as it is"] >= 1 <= found[part]["learning"] for part in parts)
    assert found["T=0 all"]["learning"] != found["T=0 all"]["as it is"]
    assert "| 0 | tokens/s |" in capsys.readouterr().out
    monkeypatch.setattr(adaptation, "decode", lambda *_: pytest.fail("what is decoded is decoded again"))
    assert adaptation.main(flags) == 0
    capsys.readouterr()
    assert adaptation.main([*flags, "--draft", "none"]) == 2
    assert capsys.readouterr().err == "error: none: not a draft directory: config.json is missing\n"
