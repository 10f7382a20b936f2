"""The benchmark is fair, resumes, and reports no unearned speed-up. The engine and the clock are fakes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from deepspec.config import EvaluateParams
from deepspec.decoding.cost import CostCurve
from deepspec.decoding.engine import generate as decode
from deepspec.decoding.request import Generation, Stats
from deepspec.decoding.scheduler import CostStop
from deepspec.device import describe_device
from deepspec.drafters.lookup import LookupDrafter
from deepspec.evaluation import benchmark, identity
from deepspec.evaluation.native import native_tokens_per_second
from deepspec.evaluation.task import Task
from deepspec.target import load_target

DRAFT, COSTS = object(), CostCurve({1: [(1, 1.0), (8, 1.1)]}, {1: 0.4})
PREFILL_S, PLAIN_S, DRAFT_S, VERIFY_S, HOST_S = 1.0, 1 / 8, 1 / 32, 7 / 64, 1 / 64  # exact in binary
ACCEPTED, PROPOSED = [2, 0, 3, 1], [3, 3, 3, 3]  # 4 rounds commit 10 tokens
TASKS = {
    "sums": [["one plus one?"], ["two plus two?"], ["three?"]],
    "talk": [["hello", "and then?"], ["bye"]],
}


class Engine:
    """Answers every prompt with ten tokens, at fixed costs, and notes how it was called."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[tuple[bool, list[int], float, int]] = []
        self.wrong: dict[
            int, int
        ] = {}  # what the drafted run writes in place of the right token, by position
        self.die_after: int | None = None

    def generate(
        self,
        target,
        drafter,
        prompt_ids,
        max_new_tokens,
        temperature=0.0,
        seed=0,
        tree=None,
        verify=None,
        controller=None,
    ):
        if prompt_ids and isinstance(prompt_ids[0], list):
            return [self.generate(target, drafter, ids, max_new_tokens)[0] for ids in prompt_ids]
        if max_new_tokens > 1:
            self.calls.append((drafter is DRAFT, prompt_ids, temperature, seed))
            assert controller is None or (type(controller), controller.curve) == (CostStop, COSTS)
            if self.die_after is not None and len(self.calls) > self.die_after:
                raise KeyboardInterrupt
        tokens = [(sum(prompt_ids) + i) % 50 for i in range(min(10, max_new_tokens))]
        if drafter is DRAFT:
            tokens = [self.wrong.get(i, token) for i, token in enumerate(tokens)]
            stats = Stats(list(ACCEPTED), list(PROPOSED), PREFILL_S, 4 * DRAFT_S, 4 * VERIFY_S)
            seconds = 4 * (DRAFT_S + VERIFY_S + HOST_S)
        else:
            stats = Stats([0] * len(tokens), [0] * len(tokens), PREFILL_S, 0.0, PLAIN_S * len(tokens))
            seconds = PLAIN_S * len(tokens)
        self.now += PREFILL_S + seconds
        return [Generation(0, prompt_ids, tokens, "length", stats)]


def fake_target(path, dtype=None, device=None) -> SimpleNamespace:
    words = " ".join

    def chat_ids(messages):
        return [ord(c) for c in words(f"{m['role']}:{m['content']}" for m in messages)]

    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: words(map(str, ids)))
    return SimpleNamespace(
        tokenizer=tokenizer, chat_ids=chat_ids, digest="d1", dtype="torch.bfloat16", device="cpu"
    )


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    engine = Engine()
    monkeypatch.setattr(benchmark, "generate", engine.generate)
    monkeypatch.setattr(identity, "generate", engine.generate)
    monkeypatch.setattr(identity, "top_two_gap", lambda target_dir, ids: 1e-6)
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: engine.now)
    monkeypatch.setattr(benchmark, "load_target", fake_target)
    monkeypatch.setattr(benchmark, "load_drafter", lambda path, target, decode: DRAFT)
    monkeypatch.setattr(benchmark, "load_or_measure", lambda target, drafter, batches: COSTS)
    monkeypatch.setattr(benchmark, "native_tokens_per_second", lambda *a: dict.fromkeys(TASKS, 8.0))
    monkeypatch.setattr(
        benchmark,
        "load_task",
        lambda name, limit, seed: Task(name, "1", "math", "made up", TASKS[name][:limit]),
    )
    return engine


@pytest.fixture
def draft_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "draft"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    return directory


def measure(draft_dir: Path, **changes) -> dict:
    params = EvaluateParams(tasks=list(TASKS), **{"max_new_tokens": 10, "lossless_new_tokens": 10, **changes})
    return benchmark.evaluate("mine", "nowhere", draft_dir, params, 0, draft_dir.parent / "work")


def test_record_counts_tau_acceptance_and_speed(engine, draft_dir):
    record = measure(draft_dir)
    entry = record["tasks"]["talk@T=0"]
    assert entry["prompts"] == 2
    assert entry["new_tokens"] == 30
    assert entry["tau"] == pytest.approx(2.5)
    # Position 1: 3 of 4 rounds; position 2: 2 of those 3; position 3: 1 of those 2.
    assert entry["accept_rate_by_position"] == pytest.approx([3 / 4, 2 / 3, 1 / 2])
    assert entry["baseline_tokens_per_second"] == pytest.approx(8.0)
    assert entry["tokens_per_second"] == pytest.approx(16.0)
    assert entry["speedup"] == pytest.approx(2.0)
    assert entry["speedup_ci95"] == pytest.approx([2.0, 2.0])
    assert (entry["draft_ms"], entry["verify_ms"]) == pytest.approx((31.25, 109.375))
    assert entry["host_ms"] == pytest.approx(15.625)
    assert entry["lossless"] is True
    assert entry["ties"] == 0


def test_record_has_every_key_of_the_contract_for_every_task_and_temperature(engine, draft_dir):
    record = measure(draft_dir)
    assert {"eval_version", "target", "drafter", "device", "dtype", "seed", "tasks", "summary"} <= set(record)
    assert set(record["tasks"]) == {f"{task}@T={t}" for task in TASKS for t in (0, 1)}
    contract = {
        *("category", "temperature", "prompts", "new_tokens", "tau", "accept_rate_by_position"),
        *("tokens_per_second", "baseline_tokens_per_second", "speedup", "speedup_ci95"),
        *("draft_ms", "verify_ms", "host_ms", "lossless", "ties"),
    }
    assert all(contract <= set(entry) for entry in record["tasks"].values())
    assert all(len(entry["output_hashes"]) == entry["prompts"] for entry in record["tasks"].values())
    summary = record["summary"]
    assert summary["speedup"] == pytest.approx(2.0)
    assert summary["speedup_vs_hf"] == pytest.approx(16.0 / 8.0)
    assert set(summary["by_temperature"]) == {"0", "1"}
    assert json.loads(json.dumps(record)) == record


def test_both_runs_of_a_turn_see_the_plain_answer_and_the_same_seed(engine, draft_dir):
    engine.wrong = {9: 49}
    measure(draft_dir, temperatures=[1.0])
    turns = [call for call in engine.calls if "and then?" in "".join(map(chr, call[1]))]
    plain, drafted = sorted(turns, key=lambda call: call[0])
    assert plain[1:] == drafted[1:]
    assert "49 user:and then?" not in "".join(map(chr, plain[1]))


def test_which_run_goes_first_alternates_by_prompt(engine, draft_dir):
    measure(draft_dir, temperatures=[0.0])
    warm_up, timed = engine.calls[:2], engine.calls[2:10]
    assert [call[0] for call in warm_up] == [False, True]
    assert [call[0] for call in timed] == [False, True, True, False, False, True, False, True]


def test_the_drafts_own_prefill_is_charged_to_it_and_the_shared_one_to_neither(
    engine, draft_dir, monkeypatch
):
    plain_generate = engine.generate

    def slow_to_begin(target, drafter, *args, **options):
        generations = plain_generate(target, drafter, *args, **options)
        if drafter is DRAFT:
            engine.now += 5 / 8
            generations[0].stats.draft_s += 5 / 8
        return generations

    monkeypatch.setattr(benchmark, "generate", slow_to_begin)
    entry = measure(draft_dir)["tasks"]["sums@T=0"]
    assert entry["speedup"] == pytest.approx(1.0)


def test_the_engine_counts_the_drafts_reading_of_the_prompt_as_drafting(tiny_target):
    class SlowReader(LookupDrafter):
        def session(self, slots):
            session = super().session(slots)
            extend = session.extend
            session.extend = lambda *args: (time.sleep(0.1), extend(*args))
            return session

    target = load_target(tiny_target)
    (slow,) = decode(target, SlowReader(block_size=4, min_match=2), [5] * 20, max_new_tokens=1)
    assert slow.stats.draft_s >= 0.1


def test_a_killed_evaluation_goes_on_and_ends_with_the_same_record(engine, draft_dir):
    whole = measure(draft_dir)
    calls = len(engine.calls)
    engine.calls.clear()
    engine.die_after = 11
    with pytest.raises(KeyboardInterrupt):
        measure(draft_dir)
    engine.die_after, done = None, len(engine.calls) - 1
    engine.calls.clear()
    assert measure(draft_dir) == whole
    assert calls - done <= len(engine.calls) <= calls - done + 6  # warm-up again, and the prompt it died in
    assert list((draft_dir.parent / "work").iterdir()) == []


def test_results_of_another_draft_are_not_taken_over(engine, draft_dir):
    engine.die_after = 11
    with pytest.raises(KeyboardInterrupt):
        measure(draft_dir)
    engine.die_after = None
    engine.calls.clear()
    (draft_dir / "config.json").write_text('{"changed": true}')
    measure(draft_dir)
    fresh = len(engine.calls)
    engine.calls.clear()
    measure(draft_dir)
    assert len(engine.calls) == fresh


def test_a_proven_tie_is_counted_and_stays_lossless(engine, draft_dir):
    engine.wrong = {3: 60}
    record = measure(draft_dir, lossless_prompts=2)
    assert record["tasks"]["sums@T=0"]["lossless"] is True
    assert record["tasks"]["sums@T=0"]["ties"] == 2
    assert record["summary"]["speedup"] is not None


def test_a_changed_token_takes_away_every_speedup_of_the_task_and_the_mean(
    engine, draft_dir, monkeypatch, capsys
):
    engine.wrong = {3: 60}
    contexts = []
    monkeypatch.setattr(identity, "top_two_gap", lambda target_dir, ids: contexts.append(ids) or 0.5)
    record = measure(draft_dir, lossless_prompts=1)
    for key in ("sums@T=0", "sums@T=1"):
        entry = record["tasks"][key]
        assert (entry["lossless"], entry["speedup"], entry["speedup_ci95"]) == (False, None, None)
    assert record["summary"]["speedup"] is None
    assert record["summary"]["speedup_vs_hf"] is None
    assert "changed the target's greedy output on sums" in capsys.readouterr().err
    prompt = fake_target("").chat_ids([{"role": "user", "content": TASKS["sums"][0][0]}])
    assert contexts[0] == prompt + [(sum(prompt) + i) % 50 for i in range(3)]  # the shared prefix alone


def test_an_output_that_stops_early_is_no_tie(engine, monkeypatch):
    def cut(target, drafter, *args, **options):
        generations = engine.generate(target, None, *args, **options)
        if drafter is DRAFT:
            generations[0].tokens = generations[0].tokens[:5]
        return generations

    monkeypatch.setattr(identity, "generate", cut)
    found = identity.check_identity(fake_target(""), DRAFT, "nowhere", [[1, 2, 3]], 10)
    assert (found.lossless, found.ties) == (False, 0)


def test_the_native_baseline_decodes_every_prompt_without_a_word_of_its_own(tiny_target, capfd):
    rates = native_tokens_per_second(tiny_target, "float32", "cpu", {"a": [5, 6, 7], "b": [8, 9]})
    assert set(rates) == {"a", "b"}
    assert all(rate > 0 for rate in rates.values())
    assert "warn" not in capfd.readouterr().err.lower()


def test_the_device_is_described_in_one_line():
    assert describe_device("cpu").endswith(f"torch {torch.__version__}")
    assert "\n" not in describe_device("cpu")
