"""The training benchmark: our side steps in a process of its own, ratios are paired, a missing rival is named."""

from __future__ import annotations

import pytest

from benchmarks.training import STEPS, Side, arguments, main, ratio, summary, table, write_setup

SMALL = [
    "--vocab",
    "256",
    "--hidden",
    "192",
    "--length",
    "40",
    "--anchors",
    "4",
    "--block",
    "3",
    "--rank",
    "8",
    "--layers",
    "1",
]


@pytest.mark.parametrize("algorithm", STEPS)
def test_our_side_steps_and_says_what_it_took(algorithm, tmp_path):
    flags = arguments().parse_args(SMALL)
    write_setup(tmp_path, algorithm, flags, "float32")
    side = Side("deepspec", tmp_path, tmp_path)
    first, second = side.step(), side.step()
    side.close()
    assert first["loss"] == pytest.approx(second["loss"]) and first["loss"] > 0
    assert second["seconds"] > 0 and second["peak"] > second["over"] >= 0


def test_ratios_are_paired_by_turn():
    found = ratio([1.0, 10.0, 2.0], [2.0, 20.0, 4.0])
    assert (found.value, found.low, found.high) == (2.0, 2.0, 2.0)


def test_the_table_says_how_ours_compares():
    step = {"seconds": 1.0, "loss": 3.5, "over": 2**20, "peak": 2**22}
    twice = {key: 2 * value for key, value in step.items()} | {"loss": 3.5}
    found = summary({"deepspec": [step] * 3, "specforge": [twice] * 3}, 100)
    assert found["tokens_per_second"] == {"deepspec": 100, "specforge": 50}
    assert found["speed_ratio"]["value"] == 2 and found["memory_ratio"] == 0.5
    assert "| dspark, float32: deepspec | 100 | 2.00× (2.00 – 2.00) | 1 | 0.50× | 4 | 3.500000 |" in table(
        {"dspark, float32": found}
    )


def test_a_missing_rival_is_named(tmp_path, capsys):
    assert main(["--specforge", str(tmp_path), *SMALL]) == 2
    assert "pip install --no-deps --target" in capsys.readouterr().err
