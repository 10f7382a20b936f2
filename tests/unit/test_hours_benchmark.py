"""benchmarks/hours.py: drafts of several lengths of training, decoded beside plain decoding, on a tiny target."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from benchmarks import hours
from deepspec.decoding.cost import CostCurve
from deepspec.files import write_json, write_text
from deepspec.target.model import load_target
from tests.drafting import make, write

ROOT = Path(__file__).parents[2]
FLAT = CostCurve({1: [(1, 1.0), (100, 1.1)]}, {1: 0.01})


@pytest.fixture
def trainings(tiny_target, tmp_path, monkeypatch) -> list[int]:
    """Steps of each training that was asked for; an untrained draft is what comes of it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_target, hours.TARGET)
    write_json(hours.DATA, {"digest": "d"})
    params = yaml.safe_load((ROOT / "params.smoke.yaml").read_text())
    params["evaluate"] |= {"tasks": ["word_problems", "conversations"], "max_new_tokens": 8}
    write_text("params.yaml", yaml.safe_dump(params))
    target, asked = load_target(hours.TARGET), []

    def train(params, name, target_directory, paths):
        asked.append(params.train.steps)
        write(make("dspark", target), target, paths.draft)
        line = {"heldout_tau": 1 + params.train.steps / 100, "hours": params.train.steps / 10}
        write_text(paths.history, json.dumps(line) + "\n")

    monkeypatch.setattr(hours, "train", train)
    monkeypatch.setattr(hours, "load_or_measure", lambda *_, **__: FLAT)
    return asked


def test_each_share_is_a_row_and_what_is_there_is_not_made_again(trainings, tmp_path, monkeypatch, capsys):
    assert hours.main(["--shares", "0.5", "1"]) == 0
    assert trainings == [6, 12]
    rows = json.loads((tmp_path / "reports/benchmarks/hours.json").read_text())["rows"]
    assert [(row["steps"], row["hours"], row["temperature"]) for row in rows] == [
        (6, 0.6, "0"),
        (12, 1.2, "0"),
        (6, 0.6, "1"),
        (12, 1.2, "1"),
    ]
    assert all(row["tau_low"] <= row["tau"] <= row["tau_high"] and row["speedup"] > 0 for row in rows)
    table = (tmp_path / "reports/benchmarks/hours.md").read_text()
    assert "| 0.5 | 6 | 0.60 | 1.060 | 0 |" in table and table in capsys.readouterr().out
    for name in ("tau", "speedup"):
        assert (tmp_path / f"reports/benchmarks/hours-{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"(hours-{name}.png)" in table
    assert hours.main(["--shares", "1", "0.25"]) == 0
    assert trainings == [6, 12, 3]


def test_decoding_goes_on_where_it_was_stopped(trainings, monkeypatch):
    decoded = []
    real = hours.Contest.prompt

    def stopping(self, task, chat, temperature, index):
        if len(decoded) == 3:
            raise KeyboardInterrupt
        decoded.append((task, temperature, index))
        return real(self, task, chat, temperature, index)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(hours.Contest, "prompt", stopping)
        hours.main(["--shares", "1"])
    monkeypatch.setattr(hours.Contest, "prompt", lambda *a: decoded.append((a[1], a[3], a[4])) or real(*a))
    assert hours.main(["--shares", "1"]) == 0
    assert len(decoded) == len(set(decoded)) == 8 and len(trainings) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--drafter", "dsprk"], "unknown drafter 'dsprk'; did you mean 'dspark'"),
        (["--shares", "1.5"], "--shares takes numbers above 0 and up to 1, found 1.5"),
    ],
)
def test_a_mistake_is_one_line(trainings, capsys, flags, message):
    assert hours.main(flags) == 2
    assert message in capsys.readouterr().err and trainings == []


def test_the_pipelines_own_draft_is_the_whole_and_must_have_noted_its_hours(trainings, capsys):
    (Path("data/drafts/dspark")).mkdir(parents=True)
    write_text("reports/train/dspark.jsonl", json.dumps({"step": 12, "heldout_tau": 1.2}) + "\n")
    assert hours.main(["--shares", "1"]) == 2
    assert "notes no hours; train the draft again" in capsys.readouterr().err and trainings == []
