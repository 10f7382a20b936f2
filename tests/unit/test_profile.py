"""`deepspec profile`: the table, the memory floor, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from deepspec.commands import profile
from deepspec.commands.profile import Settings, curve_table, parse_batches, read_bandwidth, run, weight_bytes
from deepspec.decoding import pass_times
from deepspec.decoding.cost import CostCurve
from deepspec.errors import DeepSpecError
from deepspec.target.model import load_target


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Few passes, kept in a folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(pass_times, "_TURNS", 1)
    monkeypatch.setattr(profile, "read_bandwidth", lambda device: 1e9)


def test_it_prints_the_curve_and_where_it_is_kept(tiny_target, capsys, tmp_path):
    run(Settings(str(tiny_target), None, "1,2"))
    out = capsys.readouterr().out
    assert "1 request" in out and "2 requests" in out and "1.00" in out
    assert "a thousand more add so many ms" in out.replace("\n", " ")
    assert "µs for its verdict" in out
    assert "memory floor: " in out and "times that" in out
    (file,) = (tmp_path / "deepspec" / "profiles").glob("*.json")
    assert f"kept in {file}" in out


def test_the_table_has_a_row_for_each_width_and_one_for_the_draft():
    points = {n: [(n, 0.02 * n), (32 * n, 0.04 * n)] for n in (1, 4)}
    assert len(curve_table(CostCurve(points), [1, 4]).rows) == len(pass_times.WIDTHS)
    assert len(curve_table(CostCurve(points, {1: 0.01}), [1, 4]).rows) == len(pass_times.WIDTHS) + 1
    apart = CostCurve(points, {1: 0.01}, chain_drafts={1: 0.008})
    assert len(curve_table(apart, [1, 4]).rows) == len(pass_times.WIDTHS) + 2


def test_batches_are_numbers_in_order():
    assert parse_batches("16,1,4,4") == [1, 4, 16]
    for wrong in ("", "1;4", "0,4", "1,100000"):
        with pytest.raises(DeepSpecError, match="--batches takes numbers"):
            parse_batches(wrong)


def test_an_unknown_draft_is_named(tiny_target):
    with pytest.raises(DeepSpecError, match="no such draft: nobody"):
        run(Settings(str(tiny_target), "nobody", "1"))


def test_the_weights_that_a_pass_reads_are_counted_once(tiny_target):
    target = load_target(tiny_target, dtype="float32")
    config = target.config
    d, inner = config.hidden_size, config.intermediate_size
    kv = d * config.num_key_value_heads // config.num_attention_heads
    layer = 2 * d * d + 2 * d * kv + 3 * d * inner
    expected = 4 * (config.num_hidden_layers * layer + config.vocab_size * d)
    assert weight_bytes(target) == pytest.approx(expected, rel=0.02)  # norms are small


def test_bandwidth_is_measured():
    assert read_bandwidth(torch.device("cpu"), 4, 2) > 1e8
