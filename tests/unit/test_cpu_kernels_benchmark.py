"""benchmarks/cpu_kernels.py on a tiny target: both sides run every pass, and it tells which keep a token's bits."""

from __future__ import annotations

import json

import pytest

from benchmarks import cpu_kernels
from benchmarks.cpu_kernels import Shape
from deepspec import kernels as build
from tests.tiny import cached_target


@pytest.mark.skipif(build.kernels() is None, reason=f"kernels {build.state()}")
def test_every_pass_is_timed_on_both_sides_and_ours_keep_a_tokens_bits(tmp_path, monkeypatch, capsys):
    shapes = (Shape(1), Shape(4), Shape(6, tree=True), Shape(2, 3))
    monkeypatch.setattr(cpu_kernels, "SHAPES", shapes)
    monkeypatch.setattr(cpu_kernels, "read_bandwidth", lambda device, repeats: 1e9)
    flags = [
        "--target",
        str(cached_target()),
        "--weights",
        "dense",
        "int4",
        "--turns",
        "2",
        "--output",
        str(tmp_path),
    ]
    assert cpu_kernels.main(flags) == 0
    found = json.loads((tmp_path / "cpu_kernels.json").read_text())
    for weights in ("dense", "int4"):
        passes = found[weights]["passes"]
        assert list(passes) == ["1", "4", "6, a tree", "2 of 3 requests"]
        assert all(
            row["same_bits"][0] and row["ours_s"] > 0 and row["torch_s"] > 0 for row in passes.values()
        )
    assert "| 6, a tree |" in (tmp_path / "cpu_kernels.md").read_text() and "gain" in capsys.readouterr().out


def test_without_the_kernels_it_says_why(monkeypatch, capsys):
    monkeypatch.setattr(cpu_kernels, "kernels", lambda: None)
    monkeypatch.setattr(cpu_kernels, "state", lambda: "not used: $DEEPSPEC_NATIVE is 0")
    assert cpu_kernels.main([]) == 2
    assert "our kernels are not used: $DEEPSPEC_NATIVE is 0" in capsys.readouterr().err
