"""A whole evaluation on a tiny target: resumable, repeatable, and the same for several drafters at once."""

from __future__ import annotations

import json

import pytest
import torch

from deepspec.decoding.shapes import AUTO, CHAIN
from deepspec.device import describe_device
from deepspec.drafters.algorithms.lookup import LookupDrafter
from deepspec.drafters.checkpoint import write_drafter
from deepspec.errors import DeepSpecError
from deepspec.evaluation import measure, phases
from deepspec.evaluation.native import native_tokens_per_second
from deepspec.evaluation.params import EvaluateParams
from deepspec.evaluation.record import Record
from deepspec.target.model import load_target
from tests.drafting import make, write

PARAMS = EvaluateParams(
    tasks=["word_problems", "conversations"],
    prompts_per_task=2,
    max_new_tokens=12,
    lossless_prompts=1,
    lossless_new_tokens=8,
    sweeps={"max_new_tokens": 6, "depth_nodes": 4, "nodes": [2, 4]},
    throughput={"batches": [1, 2], "lengths": [1], "groups": 1, "max_new_tokens": 4},
)


@pytest.fixture(scope="module")
def drafts(tiny_target, tmp_path_factory):
    target = load_target(tiny_target)
    folder = tmp_path_factory.mktemp("drafts")
    lookup = LookupDrafter(4, 1)
    write_drafter(folder / "lookup", lookup.config, {}, target, {"data_digest": None})
    return {"dspark": write(make("dspark", target), target, folder / "dspark"), "lookup": folder / "lookup"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Cost curves are kept between the runs of a test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def evaluated(drafts, tiny_target, tmp_path, **changes):
    params = PARAMS.model_copy(update=changes)
    return measure.evaluate(drafts, tiny_target, params, 0, tmp_path / "work")


def counted(outcome) -> list:
    """All of an outcome that no clock decides."""
    entries = [
        (key, entry["tau"], entry["output_hashes"], entry["accept_rate_by_position"])
        for key, entry in outcome.record.dump()["tasks"].items()
    ]
    texts = [[token["text"] for token in shown["tokens"]] for shown in outcome.traces]
    return [entries, texts, outcome.record.blocks, outcome.record.confidence]


def test_a_trained_draft_gets_every_section(drafts, tiny_target, tmp_path):
    (outcome,) = evaluated({"dspark": drafts["dspark"]}, tiny_target, tmp_path).values()
    record = outcome.record.dump()
    assert json.loads(json.dumps(record)) == record
    entry = record["tasks"]["conversations@T=1"]
    assert (record["dtype"], record["max_new_tokens"]) == ("float32", 12)
    assert set(entry["beside"]) == {"lookup", "fixed"}
    assert record["summary"]["lossless"] and record["summary"]["speedup"] is not None
    assert set(record["blocks"]) == set(record["confidence"]) == {"greedy", "sampled"}
    assert {point["sweep"] for point in record["sweeps"]["points"]} == {"block_length", "depth", "nodes"}
    assert all(point["speedup"] for point in record["sweeps"]["points"])
    assert {(row["batch"], row["name"]) for row in record["throughput"]} == {
        (batch, name) for batch in (1, 2) for name in ("plain", "fixed 1", "fixed 3", "scheduler")
    }
    assert record["promise"] is None  # an untrained draft made none
    assert len(outcome.prompts) == 8 and set(outcome.prompts[0]["runs"]) == {
        "plain",
        "lookup",
        "draft",
        "fixed",
    }
    assert list((tmp_path / "work").iterdir()) == []


def test_what_is_computed_has_the_rounds_of_what_is_decoded(drafts, tiny_target, tmp_path, monkeypatch):
    own = {"dspark": drafts["dspark"]}
    (decoded,) = evaluated(own, tiny_target, tmp_path).values()
    checked = []
    real = phases.check_identity
    monkeypatch.setattr(phases, "check_identity", lambda *a, **o: checked.append(a[1]) or real(*a, **o))
    changes = {"computed": True, "controllers": [], "throughput": None}
    (computed,) = evaluated(own, tiny_target, tmp_path, **changes).values()
    record = computed.record
    assert Record.parse(record.dump(), "here") == record
    for before, after in zip(decoded.prompts, computed.prompts, strict=True):
        assert set(after["runs"]) == {"plain", "draft", "lookup"}
        if before["temperature"] == 0:
            for figure in ("accepted", "output"):
                assert after["runs"]["lookup"][figure] == before["runs"]["lookup"][figure]
        assert after["runs"]["lookup"]["computed"] and "computed" not in after["runs"]["draft"]
    assert all(entry.beside["lookup"].computed for entry in record.tasks.values())
    assert all(mean.beside["lookup"].ratio for mean in record.summary.by_temperature.values())
    assert record.sweeps.computed and not decoded.record.sweeps.computed
    taus = [[(p.sweep, p.value, p.tau) for p in r.sweeps.points] for r in (record, decoded.record)]
    assert taus[0] == taus[1]
    assert all(point.speedup and point.round_ms > 0 for point in record.sweeps.points)
    assert {type(drafter).__name__ for drafter in checked} == {"LookupFirst"}, "what is timed is checked"


def test_every_prompt_of_the_check_is_decoded_once_alone_or_in_a_batch(
    drafts, tiny_target, tmp_path, monkeypatch
):
    groups = []
    real = phases.check_identity

    def noted(target, drafter, directory, references, *args, together=False, **options):
        groups.append((len(references), together))
        return real(target, drafter, directory, references, *args, together=together, **options)

    monkeypatch.setattr(phases, "check_identity", noted)
    changes = {"computed": True, "throughput": None, "lossless_prompts": 3, "tasks": ["word_problems"]}
    own = {"dspark": drafts["dspark"]}
    (outcome,) = evaluated(own, tiny_target, tmp_path, prompts_per_task=3, **changes).values()
    assert groups == [(1, False), (2, True)]
    assert outcome.record.tasks["word_problems@T=0"].lossless_checked.prompts == 3


@pytest.mark.parametrize("trees", [False, True])
def test_in_float32_what_is_timed_is_checked_even_where_it_would_draft_another_shape(
    drafts, tiny_target, tmp_path, monkeypatch, trees
):
    shapes = []
    real = phases.check_identity
    monkeypatch.setattr(phases, "check_identity", lambda *a, **o: shapes.append(a[5]) or real(*a, **o))
    monkeypatch.setattr("deepspec.evaluation.measure.settle", lambda shape, *_: shape.settled(trees))
    changes = {"computed": True, "throughput": None, "tasks": ["word_problems"]}
    (outcome,) = evaluated({"dspark": drafts["dspark"]}, tiny_target, tmp_path, **changes).values()
    assert set(shapes) == ({AUTO.greedy} if trees else {CHAIN})
    assert outcome.record.tasks["word_problems@T=0"].lossless


def test_a_plain_run_that_is_cut_is_said_to_be(drafts, tiny_target, tmp_path):
    own = {"lookup": drafts["lookup"]}
    (whole,) = evaluated(own, tiny_target, tmp_path).values()
    (cut,) = evaluated(own, tiny_target, tmp_path, plain_new_tokens=4).values()
    assert "plain_new_tokens" not in whole.record.dump() and cut.record.dump()["plain_new_tokens"] == 4
    assert counted(cut) == counted(whole), "no token of the draft's depends on it"
    tokens = {line["runs"]["plain"]["tokens"] for line in cut.prompts if line["task"] == "word_problems"}
    assert tokens == {4}


def test_the_traces_show_every_token_with_its_origin(drafts, tiny_target, tmp_path):
    (outcome,) = evaluated({"dspark": drafts["dspark"]}, tiny_target, tmp_path).values()
    assert len(outcome.traces) == 4
    for shown in outcome.traces:
        assert 1 <= len(shown["tokens"]) <= 12
        for token in shown["tokens"]:
            assert token["origin"] in ("draft", "lookup", "target")
            chances = [chance for _, chance in token["alternatives"]]
            assert chances == sorted(chances, reverse=True) and sum(chances) <= 1.001
            if token["origin"] == "draft" and shown["temperature"] == 0:
                assert token["alternatives"][0][0] == token["proposed"]


def test_the_same_seed_gives_the_same_tokens_alone_or_with_others(drafts, tiny_target, tmp_path):
    alone = evaluated({"dspark": drafts["dspark"]}, tiny_target, tmp_path)["dspark"]
    again = evaluated({"dspark": drafts["dspark"]}, tiny_target, tmp_path)["dspark"]
    together = evaluated(drafts, tiny_target, tmp_path)
    assert counted(alone) == counted(again) == counted(together["dspark"])
    assert together["lookup"].record.sweeps is None and together["lookup"].record.blocks is None
    plain = {name: [line["runs"]["plain"] for line in o.prompts] for name, o in together.items()}
    assert plain["dspark"] == plain["lookup"], "drafters measured together share the plain run"


def test_a_killed_evaluation_goes_on_where_it_stopped(drafts, tiny_target, tmp_path, monkeypatch):
    own = {"dspark": drafts["dspark"]}
    whole = counted(evaluated(own, tiny_target, tmp_path)["dspark"])
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(phases, "check_identity", _interrupt)
        evaluated(own, tiny_target, tmp_path)
    assert list((tmp_path / "work").glob("dspark-*.0.jsonl"))
    with monkeypatch.context() as patched:
        patched.setattr(phases.Contest, "prompt", _interrupt)  # those are done
        assert counted(evaluated(own, tiny_target, tmp_path)["dspark"]) == whole
    assert list((tmp_path / "work").iterdir()) == []


def test_results_of_another_draft_are_not_taken_over(drafts, tiny_target, tmp_path, monkeypatch):
    own = {"lookup": drafts["lookup"]}
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(phases, "check_identity", _interrupt)
        evaluated(own, tiny_target, tmp_path)
    (own["lookup"] / "note").write_text("changed")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(phases.Contest, "prompt", _interrupt)
        evaluated(own, tiny_target, tmp_path)
    (own["lookup"] / "note").unlink()


def test_finished_work_is_kept_until_the_results_are_written(drafts, tiny_target, tmp_path, monkeypatch):
    own = {"lookup": drafts["lookup"]}

    def full_disk(outcomes):
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        measure.evaluate(own, tiny_target, PARAMS, 0, tmp_path / "work", save=full_disk)
    saved = []
    monkeypatch.setattr(phases.Contest, "prompt", _interrupt)  # those are done
    measure.evaluate(own, tiny_target, PARAMS, 0, tmp_path / "work", save=saved.append)
    assert saved[0]["lookup"].record.summary.lossless
    assert list((tmp_path / "work").iterdir()) == []


def test_seconds_of_another_machine_are_not_taken_over(drafts, tiny_target, tmp_path, monkeypatch):
    own = {"lookup": drafts["lookup"]}
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(phases, "check_identity", _interrupt)
        evaluated(own, tiny_target, tmp_path)
    monkeypatch.setattr(measure, "describe_device", lambda device: "another machine")
    monkeypatch.setattr(phases.Contest, "prompt", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        evaluated(own, tiny_target, tmp_path)


def test_two_tasks_of_one_name_are_refused(drafts, tiny_target, tmp_path):
    with pytest.raises(DeepSpecError, match="two tasks are named 'word_problems'"):
        evaluated(drafts, tiny_target, tmp_path, tasks=["word_problems", "word_problems"])


def test_a_draft_that_kept_no_context_has_no_promise(drafts, tiny_target, tmp_path, monkeypatch):
    monkeypatch.setattr(
        phases.train_parity, "load", lambda directory: [phases.train_parity.HeldOutBlocks([], [], [], [])]
    )
    (outcome,) = evaluated({"lookup": drafts["lookup"]}, tiny_target, tmp_path).values()
    assert outcome.record.promise is None


def test_a_path_that_changes_a_token_has_no_speed(drafts, tiny_target, tmp_path, monkeypatch):
    real = phases.check_identity

    def broken(target, drafter, *args, together=False, **options):
        found = real(target, drafter, *args, together=together, **options)
        alone = together and drafter.trained is drafter
        return phases.Identity(False, 0, found.prompts, found.tokens) if alone else found

    monkeypatch.setattr(phases, "check_identity", broken)
    record = evaluated({"dspark": drafts["dspark"]}, tiny_target, tmp_path)["dspark"].record.dump()
    assert record["summary"]["speedup"] is not None  # the deployed path is sound
    assert all(row["speedup"] is None for row in record["throughput"])
    speeds = {point["sweep"]: point["speedup"] for point in record["sweeps"]["points"]}
    assert speeds["block_length"] is None and speeds["nodes"] is not None


def _interrupt(*_, **__):
    raise KeyboardInterrupt


def test_the_native_baseline_decodes_every_prompt_without_a_word_of_its_own(tiny_target, capfd):
    rates = native_tokens_per_second(tiny_target, "float32", "cpu", {"a": [5, 6, 7], "b": [8, 9]})
    assert set(rates) == {"a", "b"}
    assert all(rate > 0 for rate in rates.values())
    assert "warn" not in capfd.readouterr().err.lower()


def test_the_device_is_described_in_one_line():
    assert describe_device("cpu").endswith(f"torch {torch.__version__}")
    assert "\n" not in describe_device("cpu")
