"""The benchmark beside another commit: both sides take turns in processes of their own, ratios are of the same turn."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from benchmarks.commits import HERE, ROOT, THERE, Side, arguments, checked_out, measure, summary, table
from deepspec.errors import DeepSpecError
from deepspec.journal import WorkLog
from tests.tiny import cached_target


def unneeded(order):
    raise AssertionError("every turn is kept")


def test_two_sides_of_one_commit_write_the_same_and_are_timed_in_every_turn(tmp_path):
    flags = arguments().parse_args(
        ["HEAD", "--turns", "2", "--repeats", "2", "--tokens", "6", "--context", "16", "--restart", "1"]
    )
    directory = str(cached_target().resolve())
    sides = {name: Side(name, ROOT, directory, flags.context, 1) for name in (HERE, THERE)}
    log = WorkLog(tmp_path / "log.jsonl")
    orders = []

    def start(order):
        orders.append(order)
        return nullcontext(sides)

    found, differ = measure(start, flags, log)
    for side in sides.values():
        side.close()
    assert measure(unneeded, flags, WorkLog(tmp_path / "log.jsonl")) == (found, differ)
    assert orders == [(THERE, HERE), (HERE, THERE)]
    assert differ == [] and len(found) == 4
    assert all(len(seconds) == 2 and min(seconds) > 0 for one in found.values() for seconds in one.values())
    assert table(summary(found), "HEAD").count("\n") >= 5


def test_ratios_are_of_the_same_turn():
    made = summary({"T(1)": {HERE: [2.0, 20.0, 4.0], THERE: [1.0, 10.0, 2.0]}})
    assert made["T(1)"]["ratio"] == {"value": 2.0, "low": 2.0, "high": 2.0}
    assert (made["T(1)"][HERE], made["T(1)"][THERE]) == (4000.0, 2000.0)


def test_a_commit_that_is_not_there_is_one_line():
    with pytest.raises(DeepSpecError, match="0123456789") as caught, checked_out("0123456789"):
        pass
    assert "\n" not in str(caught.value)


def test_a_side_that_does_not_start_says_why(tmp_path):
    with pytest.raises(DeepSpecError, match=r"^here stopped: "):
        Side(HERE, ROOT, str(tmp_path / "nowhere"), 16, 1)
