"""benchmarks/decode.py put together from fakes: no llama.cpp, no network, a tiny target."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from benchmarks import decode, rivals
from benchmarks.common import Answer, DecodingConfig, Prompt, Run, interleave, load_prompts
from benchmarks.decode_report import body, figures
from deepspec.decoding.scheduler import Fixed
from deepspec.errors import DeepSpecError
from deepspec.evaluation import timing
from deepspec.journal import WorkLog
from deepspec.target.model import load_target
from tests.tiny import cached_target

PROMPTS = [Prompt("code", [1, 2]), Prompt("chat", [3])]


@pytest.fixture(scope="module")
def tiny():
    return cached_target()


class Clock:
    """Time that passes only when a runtime works."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.calls: list[str] = []
        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def config(self, name: str, seconds_a_token: float, reference: str = "slow") -> DecodingConfig:
        def work(ids: list[int], max_new_tokens: int) -> Answer:
            self.calls.append(name)
            self.now += 10.0 + seconds_a_token * (max_new_tokens - 1)  # ten seconds of prefill
            return Answer(list(range(max_new_tokens)), max_new_tokens)

        return DecodingConfig(name, name, reference, work)


def slow_and_fast(clock: Clock) -> tuple[list[DecodingConfig], dict]:
    configs = [clock.config("slow", 2.0), clock.config("fast", 0.5)]
    return configs, {each.name: lambda ids, each=each: each.decode(ids, 1) for each in configs}


def test_runs_interleave_take_turns_and_leave_the_prefill_out(monkeypatch, tmp_path):
    clock = Clock(monkeypatch)
    configs, first = slow_and_fast(clock)
    runs, bandwidths = interleave(configs, first, PROMPTS, 5, WorkLog(tmp_path / "log"), lambda: 7.0)
    assert [run.seconds for run in runs["slow"]] == [8.0, 8.0]
    assert [run.seconds for run in runs["fast"]] == [2.0, 2.0]
    assert bandwidths == [7.0, 7.0]
    decoded = [name for i, name in enumerate(clock.calls[2:]) if i % 4 == 3]  # three prefills, then the run
    assert decoded == ["slow", "fast", "fast", "slow"]


def test_a_killed_benchmark_goes_on_where_it_stopped(monkeypatch, tmp_path):
    clock = Clock(monkeypatch)
    configs, first = slow_and_fast(clock)
    interleave(configs, first, PROMPTS[:1], 5, WorkLog(tmp_path / "log"), lambda: 7.0)
    clock.calls.clear()
    runs, _ = interleave(configs, first, PROMPTS, 5, WorkLog(tmp_path / "log"), lambda: 7.0)
    assert clock.calls.count("slow") == clock.calls.count("fast") == 1 + 3 + 1
    assert len(runs["slow"]) == 2
    clock.calls.clear()
    interleave(configs, first, PROMPTS, 5, WorkLog(tmp_path / "log"), lambda: 7.0)
    assert clock.calls == []


def run(tokens: int, seconds: float, passes: int, output: str = "a", parts=(None, None, None)) -> Run:
    return Run(tokens, seconds, passes, *parts, output)


def test_the_report_has_ratios_shares_the_floor_and_a_duel():
    configs = [
        DecodingConfig("dense: plain", "dense", "dense: plain", None, 1000),
        DecodingConfig("dense: draft", "dense", "dense: plain", None, 1000),
        DecodingConfig("Hugging Face: plain", "Hugging Face", "dense: plain", None, 1000),
    ]
    runs = {
        "dense: plain": [run(11, 10.0, 11), run(11, 10.0, 11)],
        "dense: draft": [run(11, 5.0, 6, parts=(1.0, 2.0, 1.0)), run(11, 5.0, 6, "b", (1.0, 2.0, 1.0))],
        "Hugging Face: plain": [run(11, 20.0, 11), run(11, 20.0, 11)],
    }
    data = figures(configs, runs, PROMPTS, bandwidths=[1000.0, 2000.0, 4000.0])
    plain, draft, native = data["contestants"].values()
    assert plain["tokens_per_second"] == 1.0 and draft["tokens_per_second"] == 2.0
    assert draft["ratio"] == pytest.approx([2.0, 2.0, 2.0]) and native["ratio"][0] == pytest.approx(0.5)
    assert draft["ratio_by_source"]["chat"][0] == pytest.approx(2.0)
    assert draft["tau"] == pytest.approx(22 / 12) and plain["tau"] == 1.0
    assert draft["shares"] == {"draft_s": 0.25, "verify_s": 0.5, "host_s": 0.25} and native["shares"] is None
    assert plain["times_floor"] == pytest.approx(2.0)  # a pass of 1 s, 1000 bytes at 2000 a second
    assert (plain["same_answers"], draft["same_answers"]) == (2, 1)
    plain_duel, duel = data["duels"]
    assert (plain_duel["ours"], plain_duel["theirs"]) == ("dense: plain", "Hugging Face: plain")
    assert (duel["ours"], duel["theirs"]) == ("dense: draft", "Hugging Face: plain")
    assert duel["ratio"][0] == pytest.approx(4.0)
    text = body(json.loads(json.dumps(data)))
    assert "| dense: draft | 2.0 | 2.00 (2.00 – 2.00) | 1.83 | 25 / 50 / 25 % | 1000.0 | 2.00 | 1/2 |" in text
    assert "- dense: draft against Hugging Face: plain: 4.00" in text


def test_prompts_come_from_tasks_and_files(tiny, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"turns": ["How are you?", "And now?"]}\n{"turns": ["Write a poem."]}\n')
    target = load_target(tiny)
    prompts = load_prompts(target, [str(file), "word_problems"], 2)
    assert [prompt.source for prompt in prompts] == ["mine", "mine", "word_problems", "word_problems"]
    assert prompts[0].ids == target.chat_ids([{"role": "user", "content": "How are you?"}])


def test_the_benchmark_runs_end_to_end(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(decode, "read_bandwidth", lambda device, repeats: 1e9)
    flags = ["--target", str(tiny), "--prompts", "word_problems", "--count", "1", "--max-new-tokens", "8"]
    assert decode.main([*flags, "--controllers", "fixed:2", "--assistant", str(tiny)]) == 0
    written = json.loads((tmp_path / "reports/benchmarks/decode.json").read_text())
    names = list(written["contestants"])
    assert names[:3] == ["dense: plain", "dense: n-gram, fixed:2", "dense: suffix, fixed:2"]
    assert names[3:] == ["Hugging Face: plain", "Hugging Face: prompt lookup", "Hugging Face: assistant"]
    assert all(
        entry["tokens"] > 1 and entry["same_answers"] == 1 for entry in written["contestants"].values()
    )
    assert written["contestants"]["Hugging Face: plain"]["tau"] == 1.0
    assert written["contestants"]["Hugging Face: assistant"]["tau"] > 1.5  # it is the target itself
    assert written["provenance"]["command"].startswith("python -m benchmarks.")
    assert (tmp_path / "reports/benchmarks/decode.md").read_text() in capsys.readouterr().out
    assert not list((tmp_path / ".deepspec/benchmarks").iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--trees", "bushy"], "unknown tree 'bushy'"),
        (["--controllers", "fixed:many"], "'many' is not a number"),
        (["--controllers", "patient"], "unknown controller 'patient'"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--weights", "int4", "dense", "--llama-cpp"], "int4 weights go with bfloat16 activations"),
    ],
)
def test_a_bad_flag_is_one_line(tiny, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(decode, "drafters", with_features(decode.drafters))
    assert decode.main(["--target", str(tiny), "--prompts", "word_problems", "--no-hf", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def with_features(drafters):
    """The same lookups, taken for trained drafts: those are asked for trees."""

    def made(target, directories):
        found = drafters(target, directories)
        for drafter in found.values():
            drafter.layers = (0,)
        return found

    return made


def test_a_controller_takes_its_value_after_a_colon():
    controller = decode._controller("fixed:3", None, None, None)
    assert isinstance(controller, Fixed) and controller.length == 3


def test_llama_cpp_is_asked_way_by_way_and_its_idle_time_is_told(monkeypatch):
    asked = []

    class Client:
        def __init__(self, address, stop_ids):
            self.address = address

        def greedy(self, ids, tokens):
            asked.append((self.address, ids, tokens))
            return ids[::-1][:tokens], 1

    monkeypatch.setattr(rivals, "Client", Client)
    engine = rivals.LlamaCpp({"int4, plain": "here", "int4, ngram-mod": "there"}, frozenset({0}))
    assert engine.decode("int4, ngram-mod", [1, 2, 3], 2) == Answer([3, 2], 1)
    assert asked == [("there", [1, 2, 3], 2)]
    assert set(engine.idle_cpu()) == {"llama_cpp", "deepspec"} and engine.idle_cpu()["llama_cpp"] >= 0


def test_llama_cpp_has_a_configuration_for_each_way_and_its_own_prefill(tmp_path):
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"12345")
    engine = SimpleNamespace(
        clients={"dense, plain": None, "int4, ngram-mod": None}, decode=lambda *asked: asked
    )
    first_token: dict = {}
    plain, lookup = decode.llama_cpp_configs(engine, {"dense": gguf, "int4": gguf}, first_token)
    assert (plain.name, plain.reference, plain.step_bytes) == ("llama.cpp: dense, plain", "dense: plain", 5)
    assert (lookup.name, lookup.reference) == ("llama.cpp: int4, ngram-mod", "int4: plain")
    assert lookup.decode([7], 9) == ("int4, ngram-mod", [7], 9)
    assert first_token["llama.cpp: dense, plain"]([7]) == ("dense, plain", [7], 1)


def test_a_target_that_is_not_embedded_needs_its_gguf_named(tiny, tmp_path):
    with pytest.raises(DeepSpecError, match="name it with --gguf"):
        rivals.embedded_gguf(load_target(tiny), tmp_path)


def test_threads_that_never_sleep_are_refused(monkeypatch):
    rivals.check_idle_threads()
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    with pytest.raises(DeepSpecError, match="OMP_WAIT_POLICY"):
        rivals.check_idle_threads()
