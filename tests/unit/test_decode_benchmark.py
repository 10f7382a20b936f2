"""benchmarks/decode.py put together from fakes: no llama.cpp, no network, a tiny target."""

from __future__ import annotations

import json
import sys
import types
from types import SimpleNamespace

import pytest

from benchmarks import decode, llama_cpp, rivals
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
    (duel,) = data["duels"]
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
        (["--llama-cpp-env", "nowhere"], "no environment with llama-cpp-python"),
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


WORKER = """
import json, sys
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    ask = json.loads(line)
    if not ask["ids"]:
        raise SystemExit("out of ids")
    tokens = ask["ids"][::-1][:ask["max_new_tokens"]]
    passes = len(tokens) if ask["mode"] == "plain" else 1
    print(json.dumps({"tokens": tokens, "passes": passes, "idle_cpu_s": 0.0}), flush=True)
"""


def test_the_llama_cpp_worker_is_asked_line_by_line(tmp_path, monkeypatch):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    monkeypatch.setattr(rivals, "WORKER", script)
    engine = rivals.LlamaCpp(sys.executable, tmp_path / "any.gguf", threads=1, context=64)
    assert engine.decode("plain", [1, 2, 3], 2, frozenset({0})) == Answer([3, 2], 2)
    assert engine.decode("lookup", [1, 2, 3], 3, frozenset()) == Answer([3, 2, 1], 1)
    assert engine.idle_cpu()["llama_cpp"] == 0.0
    with pytest.raises(DeepSpecError, match="worker ended with status 1: out of ids"):
        engine.decode("plain", [], 1, frozenset())


def test_the_worker_counts_passes_and_stops_at_a_stop_token(monkeypatch):
    class Llama:
        """Counts up from the last prompt token, two tokens a pass."""

        def __init__(self, path, draft_model, **options):
            self.fresh = True

        def reset(self):
            self.fresh = True

        def eval(self, tokens):
            pass

        def generate(self, ids, temp):
            assert temp == 0.0 and self.fresh
            self.fresh = False
            token = ids[-1]
            while True:
                self.eval([token])
                for _ in range(2):
                    token += 1
                    yield token

    speculative = types.SimpleNamespace(LlamaPromptLookupDecoding=lambda num_pred_tokens: num_pred_tokens)
    monkeypatch.setitem(sys.modules, "llama_cpp", types.SimpleNamespace(Llama=Llama))
    monkeypatch.setitem(sys.modules, "llama_cpp.llama_speculative", speculative)
    model = llama_cpp.Model("any.gguf", 1, 64, draft_tokens=4)
    assert model.decode([1, 5], 3, stop_ids=[]) == {"tokens": [6, 7, 8], "passes": 2}
    assert model.decode([1, 5], 9, stop_ids=[7]) == {"tokens": [6, 7], "passes": 1}


def test_a_target_that_is_not_embedded_needs_its_gguf_named(tiny, tmp_path):
    with pytest.raises(DeepSpecError, match="name it with --gguf"):
        rivals.embedded_gguf(load_target(tiny), tmp_path)


def test_threads_that_never_sleep_are_refused(monkeypatch):
    rivals.check_idle_threads()
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    with pytest.raises(DeepSpecError, match="OMP_WAIT_POLICY"):
        rivals.check_idle_threads()
