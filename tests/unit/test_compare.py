"""`deepspec compare`: paired by prompt, refuses what cannot be compared, exits with 1 where B is worse."""

from __future__ import annotations

import json
import random

import pytest
from typer.testing import CliRunner

from deepspec.cli import app
from deepspec.errors import DeepSpecError
from deepspec.evaluation.record import EVAL_VERSION
from deepspec.report.compare import compare, load
from tests.records import PROMPTS, entry, output_hashes, prompt_lines, record


def write(
    path,
    gain: float = 2.0,
    accepted: int = 2,
    machine: float = 1.0,
    lossless: bool = True,
    count: int = PROMPTS,
    **changes,
):
    """A record whose draft is `gain` times as fast as plain decoding on a machine `machine` times as slow."""
    lines = list(prompt_lines(gain, accepted, machine, count, label=path.stem))
    speedup = gain if lossless else None
    entries = {
        key: entry(float(key.rsplit("=")[-1]), speedup)
        | {"prompts_digest": f"{key} digest", "output_hashes": found}
        for key, found in output_hashes(lines).items()
    }
    path.write_text(
        json.dumps(
            record(speedup=speedup, **{"device": "a", "target_digest": "t", "tasks": entries} | changes)
        )
    )
    path.with_suffix(".prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def paths(tmp_path):
    return tmp_path / "a.json", tmp_path / "b.json"


def run(*words) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["compare", *map(str, words)])
    return result.exit_code, " ".join(result.output.split())


def test_an_equal_draft_on_a_slower_machine_is_not_worse(paths):
    a, b = write(paths[0]), write(paths[1], machine=3.0)
    found = compare(load(a), load(b))
    assert found.failures == []
    for line in found.lines:
        assert [line.ratio.value, line.ratio.low, line.ratio.high] == pytest.approx([1.0] * 3)
    assert {(line.task, line.temperature, line.figure) for line in found.lines} == {
        (task, t, figure)
        for task in ("sums", "talk", None)
        for t in (0.0, 1.0)
        for figure in ("speedup", "tau")
    }
    code, text = run(a, b)
    assert code == 0 and "B is not worse than A" in text


def test_a_slower_draft_is_worse_beyond_the_margin_alone(paths):
    a, b = write(paths[0]), write(paths[1], gain=1.9)
    assert [line.ratio.value for line in compare(load(a), load(b)).lines if line.figure == "speedup"] == (
        pytest.approx([0.95] * 6)
    )
    code, text = run(a, b)
    assert code == 1 and "worse: speedup at T = 0 is 0.950 (0.950–0.950) of A's; at least 0.970" in text
    assert run(a, b, "--margin", "0.06")[0] == 0
    assert run(b, a)[0] == 0


def test_a_lower_tau_is_worse_though_the_clock_says_nothing(paths):
    a, b = write(paths[0]), write(paths[1], accepted=1)
    failures = compare(load(a), load(b)).failures
    assert len(failures) == 2 and all(failure.startswith("tau") for failure in failures)


def test_proof_asks_for_the_whole_interval(paths):
    a, b = write(paths[0]), write(paths[1])
    lines = paths[1].with_suffix(".prompts.jsonl").read_text().splitlines()
    rng = random.Random(1)
    noisy = []
    for text in lines:
        line = json.loads(text)
        line["runs"]["draft"]["seconds"] *= rng.choice([0.5, 1.4])
        noisy.append(json.dumps(line))
    paths[1].with_suffix(".prompts.jsonl").write_text("\n".join(noisy) + "\n")
    assert compare(load(a), load(b)).failures == []
    assert compare(load(a), load(b), proof=True).failures


def test_a_draft_that_changes_a_token_is_worse_whatever_its_speed(paths):
    a, b = write(paths[0]), write(paths[1], gain=9.0, lossless=False)
    found = compare(load(a), load(b))
    assert found.failures == ["B changes the target's greedy output"]
    assert all(line.ratio is None and line.second is None for line in found.lines if line.figure == "speedup")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_digest": "u"}, "target_digest is t in A and u in B"),
        ({"seed": 1}, "seed is 0 in A and 1 in B"),
        ({"max_new_tokens": 8}, "max_new_tokens is 96 in A and 8 in B"),
    ],
)
def test_what_cannot_be_compared_is_refused(paths, changes, message):
    a, b = write(paths[0]), write(paths[1], **changes)
    with pytest.raises(DeepSpecError, match=message):
        compare(load(a), load(b))
    code, _ = run(a, b)
    assert code == 2


def test_a_record_on_other_prompts_or_of_another_version_is_refused(paths):
    a, b = write(paths[0]), write(paths[1])
    changed = json.loads(b.read_text())
    for each in changed["tasks"].values():
        each["prompts_digest"] = "x"
    b.write_text(json.dumps(changed))
    with pytest.raises(DeepSpecError, match="other prompts"):
        compare(load(a), load(b))
    a, b = write(paths[0]), write(paths[1], eval_version="1")
    with pytest.raises(DeepSpecError, match=f"eval_version is {EVAL_VERSION} in A and 1 in B"):
        compare(load(a), load(b))
    a = write(paths[0], eval_version="1")
    with pytest.raises(DeepSpecError, match=f"of evaluation version 1, not {EVAL_VERSION}; evaluate again"):
        compare(load(a), load(b))
    assert run(b, b)[0] == 2  # not 1, which says that B is worse


def test_prompts_that_an_interrupted_run_left_beside_an_older_record_are_refused(paths):
    a = write(paths[0])
    newer = a.with_suffix(".prompts.jsonl").read_text().replace("a 3", "other tokens")
    a.with_suffix(".prompts.jsonl").write_text(newer)
    with pytest.raises(DeepSpecError, match=r"a\.prompts\.jsonl: not of the run that wrote a\.json"):
        load(a)


def test_one_prompt_a_task_gives_a_ratio_and_proves_nothing(paths):
    a, b = write(paths[0], count=1), write(paths[1], count=1)
    found = compare(load(a), load(b))
    assert found.failures == [] and {line.ratio.bounds for line in found.lines} == {None}
    assert len(compare(load(a), load(b), proof=True).failures) == 4
    code, text = run(a, b, "--proof")
    assert code == 1 and "1.000 (one prompt) of A's" in text


def test_other_devices_are_noted(paths):
    found = compare(load(write(paths[0])), load(write(paths[1], device="b")))
    assert found.notes == ["measured on different devices: a; b"]


def test_a_missing_or_broken_file_is_one_line(paths):
    a = write(paths[0])
    assert run(a, paths[1])[0] == 2
    paths[1].write_text("{}")
    with pytest.raises(DeepSpecError, match=r"b\.prompts\.jsonl: no such file"):
        load(paths[1])
    paths[1].with_suffix(".prompts.jsonl").write_text("{}\n")
    with pytest.raises(DeepSpecError, match="not an evaluation record"):
        load(paths[1])
