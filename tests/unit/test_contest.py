"""The contest is fair and the record says what was measured. The engine and the clock are fakes."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest

from deepspec.decoding.engine import generate as decode
from deepspec.decoding.params import CostController, FixedController, ThresholdController
from deepspec.decoding.request import Generation, Stats
from deepspec.drafters.algorithms.lookup import LookupDrafter
from deepspec.evaluation import contest, identity, timing
from deepspec.evaluation.bench import label_of
from deepspec.evaluation.contest import Contest, DecodingConfig
from deepspec.evaluation.parts import Decode, DraftProvenance
from deepspec.evaluation.record import DRAFT, LOOKUP, Identity
from deepspec.evaluation.runs import PLAIN, from_json, prompt_seed, to_json
from deepspec.evaluation.summarise import Measured, Subject, build_record, tau_by_output_position
from deepspec.messages.prompt import Chat
from deepspec.target.model import load_target
from deepspec.tasks.task import Task
from tests import records

DRAFTER, BASELINE = object(), object()
PREFILL_S, PLAIN_S, DRAFT_S, VERIFY_S, HOST_S = 1.0, 1 / 8, 1 / 32, 7 / 64, 1 / 64  # exact in binary
ACCEPTED, PROPOSED = [2, 0, 3, 1], [3, 3, 3, 3]  # 4 rounds commit 10 tokens
TASKS = {
    "sums": [["one plus one?"], ["two plus two?"], ["three?"]],
    "talk": [["hello", "and then?"], ["bye"]],
}
FINE = Identity(lossless=True, ties=0, prompts=2, tokens=20)


class Engine:
    """Answers every prompt with ten tokens, at fixed costs, and notes how it was called."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[tuple[object, list[int], float, int]] = []
        self.wrong: dict[
            int, int
        ] = {}  # what the drafted run writes in place of the right token, by position
        self.reading_s = 0.0  # what the draft takes for the prompt

    def generate(self, target, drafter, prompt_ids, max_new_tokens, temperature=0.0, seed=0, **_):
        if prompt_ids and isinstance(prompt_ids[0], list):
            return [self.generate(target, drafter, ids, max_new_tokens)[0] for ids in prompt_ids]
        if max_new_tokens > 1:
            self.calls.append((drafter, prompt_ids, temperature, seed))
        tokens = [(sum(prompt_ids) + i) % 50 for i in range(min(10, max_new_tokens))]
        if drafter is DRAFTER:
            tokens = [self.wrong.get(i, token) for i, token in enumerate(tokens)]
            stats = Stats(
                list(ACCEPTED), list(PROPOSED), PREFILL_S, 4 * DRAFT_S + self.reading_s, 4 * VERIFY_S
            )
            seconds = 4 * (DRAFT_S + VERIFY_S + HOST_S) + self.reading_s
        else:
            stats = Stats([0] * len(tokens), [0] * len(tokens), PREFILL_S, 0.0, PLAIN_S * len(tokens))
            seconds = PLAIN_S * len(tokens)
        self.now += PREFILL_S + seconds
        return [Generation(0, prompt_ids, tokens, "length", stats)]


def fake_target() -> SimpleNamespace:
    words = " ".join

    def chat_ids(messages, *_):
        return [ord(c) for c in words(f"{m['role']}:{m['content']}" for m in messages)]

    return SimpleNamespace(
        tokenizer=SimpleNamespace(decode=lambda ids, skip_special_tokens: words(map(str, ids))),
        chat_ids=chat_ids,
    )


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    engine = Engine()
    monkeypatch.setattr(contest, "generate", engine.generate)
    monkeypatch.setattr(identity, "generate", engine.generate)
    monkeypatch.setattr(identity, "top_two_gap", lambda target_dir, ids: 1e-6)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: engine.now))
    return engine


def tasks() -> list[Task]:
    return [
        Task(name, "1", "math", "made up", [Chat.of_turns(turns) for turns in prompts], f"{name} digest")
        for name, prompts in TASKS.items()
    ]


def hold() -> dict:
    configs = [DecodingConfig(PLAIN), DecodingConfig(LOOKUP, BASELINE), DecodingConfig(DRAFT, DRAFTER)]
    held = Contest(fake_target(), configs, 10, 0)
    return {
        (task.name, temperature): [
            held.prompt(task.name, p, temperature, i) for i, p in enumerate(task.prompts)
        ]
        for task in tasks()
        for temperature in (0.0, 1.0)
    }


def record(checks: dict[str, Identity] | None = None, **extra) -> dict:
    """The record as JSON holds it."""
    checks = checks or dict.fromkeys(TASKS, FINE)
    subject = Subject("mine", "d0", "x", "t0", "a machine", "bfloat16", 0, 1, 10)
    made = records.record()
    means = Decode(**made["decode"]), DraftProvenance(**made["provenance"])
    identities = {DRAFT: checks, LOOKUP: dict.fromkeys(TASKS, FINE)}
    measured = Measured(hold(), identities, dict.fromkeys(TASKS, 8.0), *means, **extra)
    return build_record(subject, tasks(), measured).dump()


def test_record_counts_tau_acceptance_and_speed(engine):
    entry = record()["tasks"]["talk@T=0"]
    assert (entry["prompts"], entry["new_tokens"], entry["rounds"]) == (2, 30, 12)
    assert entry["tau"] == pytest.approx(2.5)
    # Position 1: 3 of 4 rounds; position 2: 2 of those 3; position 3: 1 of those 2.
    assert entry["accept_rate_by_position"] == pytest.approx([3 / 4, 2 / 3, 1 / 2])
    assert entry["reached_by_position"] == [12, 9, 6]
    assert entry["baseline_tokens_per_second"] == pytest.approx(8.0)
    assert entry["tokens_per_second"] == pytest.approx(16.0)
    assert entry["speedup"] == pytest.approx(2.0)
    assert entry["speedup_ci95"] == pytest.approx([2.0, 2.0])
    assert (entry["draft_ms"], entry["verify_ms"]) == pytest.approx((31.25, 109.375))
    assert entry["host_ms"] == pytest.approx(15.625)
    assert entry["lossless"] is True
    assert entry["ties"] == 0
    lookup = entry["beside"]["lookup"]
    assert (lookup["speedup"], lookup["tau"], lookup["ratio"]) == pytest.approx((1.0, 1.0, 2.0))


def test_record_has_every_key_of_the_contract_for_every_task_and_temperature(engine):
    found = record()
    assert {"eval_version", "target", "drafter", "device", "dtype", "seed", "tasks", "summary"} <= set(found)
    assert set(found["tasks"]) == {f"{task}@T={t}" for task in TASKS for t in (0, 1)}
    contract = {
        *("category", "temperature", "prompts", "new_tokens", "tau", "accept_rate_by_position"),
        *("tokens_per_second", "baseline_tokens_per_second", "speedup", "speedup_ci95"),
        *("draft_ms", "verify_ms", "host_ms", "lossless", "ties"),
    }
    assert all(contract <= set(entry) for entry in found["tasks"].values())
    assert all(len(entry["output_hashes"]) == entry["prompts"] for entry in found["tasks"].values())
    summary = found["summary"]
    assert summary["speedup"] == pytest.approx(2.0)
    assert summary["speedup_vs_hf"] == pytest.approx(16.0 / 8.0)
    assert set(summary["by_temperature"]) == {"0", "1"}
    assert summary["by_temperature"]["0"]["beside"]["lookup"]["ratio"] == pytest.approx(2.0)
    assert json.loads(json.dumps(found)) == found


def test_all_runs_of_a_turn_see_the_plain_answer_and_the_same_seed(engine):
    engine.wrong = {9: 49}
    hold()
    turns = [call for call in engine.calls if "and then?" in "".join(map(chr, call[1])) and call[2] == 1.0]
    assert len(turns) == 3
    assert len({(tuple(ids), temperature, seed) for _, ids, temperature, seed in turns}) == 1
    assert "49 user:and then?" not in "".join(map(chr, turns[0][1]))


def test_who_goes_first_moves_on_with_each_prompt(engine):
    hold()
    names = {None: PLAIN, DRAFTER: DRAFT, BASELINE: LOOKUP}
    order = [names[call[0]] for call in engine.calls[:9]]
    assert order == [PLAIN, LOOKUP, DRAFT, LOOKUP, DRAFT, PLAIN, DRAFT, PLAIN, LOOKUP]


def test_a_prompts_seed_depends_on_nothing_but_the_prompt():
    seed = prompt_seed(0, "talk", ["hello", "and then?"], 1)
    assert seed == prompt_seed(0, "talk", ["hello", "and then?", "more"], 1)
    others = [
        (1, "talk", ["hello", "and then?"], 1),
        (0, "sums", ["hello", "and then?"], 1),
        (0, "talk", ["hello"], 0),
    ]
    assert seed not in {prompt_seed(*other) for other in others}


def test_the_drafts_own_prefill_is_charged_to_it_and_the_shared_one_to_neither(engine):
    engine.reading_s = 5 / 8
    assert record()["tasks"]["sums@T=0"]["speedup"] == pytest.approx(1.0)


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


def test_runs_survive_json(engine):
    (first, *_) = hold()["talk", 0.0]
    assert from_json(json.loads(json.dumps(to_json(first)))) == first


def test_tau_by_output_position_starts_anew_with_each_turn(engine):
    (talk, _) = hold()["talk", 0.0]
    bins = tau_by_output_position([talk[DRAFT]])
    assert [(b.start, b.rounds, b.tau) for b in bins] == [(0, 8, 2.5)]
    long = from_json({"x": {"accepted": [[15, 0, 9]], "drafted": [[15, 1, 9]]}})["x"]
    found = [(b.start, b.end, b.rounds, b.tau) for b in tau_by_output_position([long])]
    assert found == [(0, 16, 1, 16.0), (16, 32, 2, 5.5)]


def check(engine: Engine, **options) -> Identity:
    target = fake_target()
    prompts = [target.chat_ids([{"role": "user", "content": p[0]}]) for p in TASKS["sums"][:2]]
    references = engine.generate(target, None, prompts, 10)
    return identity.check_identity(target, DRAFTER, "nowhere", references, 10, **options)


@pytest.mark.parametrize("together", [False, True])
def test_a_proven_tie_is_counted_and_stays_lossless(engine, together):
    engine.wrong = {3: 60}
    found = check(engine, together=together)
    assert found == Identity(lossless=True, ties=2, prompts=2, tokens=20)


def test_a_changed_token_takes_away_every_speedup_of_the_task_and_the_mean(engine, monkeypatch, caplog):
    engine.wrong = {3: 60}
    contexts = []
    monkeypatch.setattr(identity, "top_two_gap", lambda target_dir, ids: contexts.append(ids) or 0.5)
    broken = check(engine)
    assert not broken.lossless
    prompt = fake_target().chat_ids([{"role": "user", "content": TASKS["sums"][0][0]}])
    assert contexts[0] == prompt + [(sum(prompt) + i) % 50 for i in range(3)]  # the shared prefix alone
    found = record({"sums": broken, "talk": FINE})
    for key in ("sums@T=0", "sums@T=1"):
        entry = found["tasks"][key]
        assert (entry["lossless"], entry["speedup"], entry["speedup_ci95"]) == (False, None, None)
        assert entry["beside"]["lookup"]["ratio"] is None
    assert found["summary"]["speedup"] is None
    assert found["summary"]["speedup_vs_hf"] is None
    assert found["summary"]["by_temperature"]["0"]["beside"]["lookup"]["ratio"] is None
    assert [warning["name"] for warning in found["warnings"]] == ["not_lossless"]
    assert "not_lossless: the target's greedy output changed on sums" in caplog.text


def test_an_output_that_stops_early_is_no_tie(engine, monkeypatch):
    def cut(target, drafter, *args, **options):
        generations = engine.generate(target, None, *args, **options)
        generations[0].tokens = generations[0].tokens[:5]
        return generations

    references = engine.generate(None, None, [[1, 2, 3]], 10)
    monkeypatch.setattr(identity, "generate", cut)
    found = identity.check_identity(fake_target(), DRAFTER, "nowhere", references, 10)
    assert (found.lossless, found.ties) == (False, 0)


def test_what_does_not_pay_is_named(engine):
    engine.reading_s = 4.0
    found = record()
    names = [warning["name"] for warning in found["warnings"]]
    assert names == ["slower_than_plain", "weaker_than_lookup"] * 2
    assert "T = 1" in found["warnings"][-1]["message"]


@pytest.mark.parametrize(
    ("chosen", "label"),
    [
        (ThresholdController(least=0.0), "threshold 0"),
        (ThresholdController(least=0.25), "threshold 0.25"),
        (FixedController(), "fixed"),
        (FixedController(length=1), "fixed 1"),
        (CostController(), "cost"),
        (CostController(corrected=True), "cost corrected"),
    ],
)
def test_a_controller_is_named_by_what_it_was_given(chosen, label):
    assert label_of(chosen) == label
