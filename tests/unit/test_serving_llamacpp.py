"""llama.cpp: found or set up, started, asked, timed, advised on, and its law at T = 1 tested."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from deepspec.cli import app
from deepspec.decoding.engine import generate
from deepspec.errors import DeepSpecError
from deepspec.export.engines import export
from deepspec.export.llamacpp import Options
from deepspec.export.readers.gguf import draft_kind
from deepspec.files import write_json
from deepspec.serving.llamacpp import costs, environment, law
from deepspec.serving.llamacpp.client import LlamaCpp
from deepspec.serving.llamacpp.environment import Environment
from deepspec.serving.llamacpp.launch import Server, serving
from deepspec.serving.llamacpp.record import LlamaCppRecord
from deepspec.serving.protocols import Answer, Counts, Prompt, Turn
from deepspec.target.model import load_target
from tests.engines import FakeEngine
from tests.exporting import LAYERS, make_draft
from tests.tiny import cached_target

ROOT = Path(__file__).parents[2]
K = 3
PROMPT = Prompt("task", "text", [5, 6, 7])


def counting(ids, most):
    return list(range(10, 10 + most))


def test_an_answer_is_told_turn_by_turn():
    with FakeEngine("llamacpp", counting, accepted=2, drafted=K) as served:
        answer = LlamaCpp(served.url).answer(PROMPT, 8, True)
    assert answer.tokens == list(range(10, 18))
    assert (
        answer.turns == (Turn(K, 2, pytest.approx(0.01)),) * 3
    )  # 1 + 3 + 3 + the last of which one is needed
    assert answer.counts == Counts(3, 9, 6, (3, 3, 0))
    assert answer.seconds == pytest.approx(0.03) and answer.timed_tokens == 9


def test_plain_answers_have_turns_without_drafts():
    with FakeEngine("llamacpp", counting, accepted=None) as served:
        answer = LlamaCpp(served.url).answer(PROMPT, 5, False)
    assert answer.turns == (Turn(0, 0, pytest.approx(0.01)),) * 4 and answer.counts == Counts()


def test_an_answer_ends_with_its_stop_token_and_the_turn_counts_in_full():
    with FakeEngine("llamacpp", counting, accepted=2, drafted=K) as served:
        answer = LlamaCpp(served.url, [12]).answer(PROMPT, 8, True)
    assert answer.tokens == [10, 11, 12] and answer.counts == Counts(1, K, 2, (1, 1, 0))


def test_tokens_of_parts_of_characters_are_asked_again():
    class Silent(FakeEngine):
        def _llamacpp_post(self, path, body):
            text = super()._llamacpp_post(path, body)
            if not body["stream"]:
                return text
            events = text.split("\n\n")
            return "\n\n".join(event for event in events if '"tokens": [12]' not in event)

    with Silent("llamacpp", counting, accepted=2, drafted=K) as served:
        answer = LlamaCpp(served.url).answer(PROMPT, 8, True)
    assert answer.tokens == list(range(10, 18)) and answer.counts.accepted == 6


def test_a_server_without_a_draft_is_named():
    with (
        FakeEngine("llamacpp", counting, accepted=None) as served,
        pytest.raises(DeepSpecError, match="--spec-type"),
    ):
        LlamaCpp(served.url).answer(PROMPT, 8, True)


def test_sampling_is_of_the_whole_law():
    with FakeEngine("llamacpp", counting) as served:
        assert LlamaCpp(served.url).sample(PROMPT, 4, seed=3) == [10, 11, 12, 13]
        (body,) = served.requests
    assert (body["temperature"], body["top_k"], body["top_p"], body["min_p"], body["seed"]) == (
        1.0,
        0,
        1.0,
        0.0,
        3,
    )


def draws(shares, random, prompts=3, count=60):
    return [random.choice(len(shares), size=count, p=shares).tolist() for _ in range(prompts)]


def test_two_samples_of_one_law_are_not_told_apart_and_of_two_they_are():
    random = np.random.default_rng(1)
    same = [law.p_value(draws([0.6, 0.3, 0.1], random), draws([0.6, 0.3, 0.1], random)) for _ in range(5)]
    other = law.p_value(draws([0.6, 0.3, 0.1], random), draws([0.3, 0.6, 0.1], random))
    assert min(same) > 0.01 and other < 0.001


def test_the_law_looks_at_second_tokens_and_lengths():
    answers = [[[7, 8, 9], [7]], [[7, 9]]]
    assert law.second_tokens(answers) == [[8, -1], [9]]
    assert law.answer_lengths(answers) == [[3, 1], [2]]


PLAIN = Server(Path("target.gguf"), 128, 2)
DRAFT = replace(PLAIN, kind="draft-dspark", draft=Path("draft.gguf"), tokens=5)


def timed(server, name):
    """A pass over n tokens takes 9 + n ms, a draft 2 ms a token."""
    drafted = server.tokens if server.kind else 0
    seconds = (10 + drafted + 2 * drafted * server.kind.startswith("draft")) / 1000
    return Answer([], 0, 0, turns=(Turn(drafted, 0, seconds),) * 4 + (Turn(0, 0, 9.0),))


def test_passes_and_rounds_are_timed_at_each_length():
    found = costs.measure(timed, PLAIN, DRAFT)
    assert found.passes == pytest.approx({1: 0.010, 2: 0.011, 3: 0.012, 4: 0.013, 6: 0.015})
    assert found.rounds == pytest.approx({1: 0.013, 2: 0.016, 3: 0.019, 5: 0.025})


@pytest.mark.parametrize(
    ("by_position", "drafted", "says"),
    [((10, 10, 10, 10, 10), 5, "draft 5: 6.00 tokens a round of 25.0 ms, a plain token 10.0 ms: 2.40× expected"),
     ((8, 1, 0, 0, 0), 1, "draft 1: 1.80 tokens"),
     ((1, 0, 0, 0, 0), 1, "do not draft here: at best 1 drafted, 1.10 tokens a round of 13.0 ms")],
)  # fmt: skip
def test_the_advice_follows_from_acceptance_and_costs(by_position, drafted, says):
    found = costs.measure(timed, PLAIN, DRAFT)
    choices = costs.choices(found, Counts(10, 50, sum(by_position), by_position))
    best = max(choices, key=lambda choice: choice.speedup)
    assert best.drafted == drafted and costs.advice(choices, found).startswith(says)


def test_a_llama_server_of_ones_own_gets_the_same_as_flags():
    words = " ".join(replace(DRAFT, least=0.5, cache="f32").flags(8080))
    for flags in (
        "--spec-type draft-dspark", "--spec-draft-n-max 5 --spec-draft-p-min 0.5", "-ctk f32 -ctv f32", "--port 8080",
        f"-md {Path('draft.gguf').resolve()}",
    ):  # fmt: skip
        assert flags in words
    assert "--spec" not in " ".join(PLAIN.flags(1))
    assert "--spec-ngram-simple-size-m 4" in " ".join(
        replace(PLAIN, kind="ngram-simple", match=1, tokens=4).flags(1)
    )


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """An empty cache; installing makes a Python that says it has the wheel."""
    place = tmp_path / "engines" / "xllamacpp"
    ran = []

    def run(command, what):
        ran.append(what)
        (place / "bin").mkdir(parents=True, exist_ok=True)
        (place / "bin" / "pip").touch()

    monkeypatch.setattr(environment, "CACHED", place)
    monkeypatch.setattr(environment, "_run", run)
    wheel = Environment("xllamacpp 1", "CPU : AVX2 = 1 | FMA = 0 |")
    monkeypatch.setattr(environment, "_python", lambda python: replace(wheel, python=python))
    monkeypatch.delenv(environment.BINARY, raising=False)
    return ran


def test_the_wheel_is_set_up_once(cached):
    assert environment.find() is None
    made = environment.find_or_set_up()
    assert cached == ["make an environment", f"install xllamacpp=={environment.VERSION}"]
    assert environment.find_or_set_up() == made and len(cached) == 2
    assert environment.described(made) == "xllamacpp 1 (AVX2)"


def test_a_named_llama_server_must_be_one(cached, tmp_path, monkeypatch):
    server = tmp_path / "llama-server"
    monkeypatch.setenv(environment.BINARY, str(server))
    with pytest.raises(DeepSpecError, match="is no llama-server"):
        environment.find()
    server.write_text("#!/bin/sh\necho 'version: 11549 (abc)' >&2\n")
    server.chmod(0o755)
    found = environment.find()
    assert found.version == "llama-server 11549 (abc)" and found.binary == server


def test_another_machine_is_told_to_build(cached, monkeypatch):
    monkeypatch.setattr(environment.platform, "machine", lambda: "riscv64")
    with pytest.raises(DeepSpecError, match="build llama-server and name it in"):
        environment.find_or_set_up()


def test_a_server_that_aborts_is_an_error_of_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    aborting = tmp_path / "llama-server"
    aborting.write_text("#!/bin/sh\necho 'RuntimeError: Failed to init server'\nexit 1\n")
    aborting.chmod(0o755)
    with (
        pytest.raises(
            DeepSpecError, match=r"llama\.cpp ended while it started: RuntimeError: Failed to init server"
        ),
        serving(Environment("1", "", binary=aborting), PLAIN, "plain"),
    ):
        pass


@pytest.fixture
def project(tiny_target, tmp_path, monkeypatch):
    """A project with a DSpark draft and its record of an export that passed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DEEPSPEC_TASKS_DIR", raising=False)
    Path("data").mkdir()
    Path("data/target").symlink_to(tiny_target)
    shutil.copy(ROOT / "params.smoke.yaml", "params.yaml")
    target = load_target("data/target")
    draft = make_draft(Path("data/drafts"), target, "dspark", target_layer_ids=[0, 1], block_size=K)
    done = CliRunner().invoke(app, ["export", "--drafter", "dspark", "--to", "llamacpp"])
    assert done.exit_code == 0, done.output
    return draft


WORK = ("--tasks", "word_problems", "--prompts", "2", "--max-new-tokens", "40", "--draws", "3")


def check(*words):
    return CliRunner().invoke(
        app, ["serve-check", "--engine", "llamacpp", "--drafter", "dspark", *WORK, *words]
    )


def play(monkeypatch, accepted: int) -> list[Server]:
    """Plays every server: the target's own tokens, and so many drafted ones accepted."""
    asked = []
    target = load_target("data/target", dtype="float32")

    def answer(ids, most):
        (out,) = generate(target, None, ids, max_new_tokens=most)
        return out.tokens

    @contextmanager
    def played(environment, server, name):
        asked.append(server)
        with FakeEngine("llamacpp", answer, accepted if server.kind else None, server.tokens or K) as engine:
            yield engine.url

    monkeypatch.setattr("deepspec.serving.llamacpp.check.serving", played)
    monkeypatch.setattr(
        "deepspec.serving.llamacpp.check.find_or_set_up", lambda: Environment("xllamacpp 1", "")
    )
    return asked


def test_a_check_writes_ways_costs_advice_and_law(project, monkeypatch):
    asked = play(monkeypatch, accepted=0)
    done = check()
    assert done.exit_code == 0, done.output
    record = LlamaCppRecord.read("reports/serve/dspark-llamacpp.json")
    assert record.drafter == "dspark" and record.method == "draft-dspark" and record.precision == "f16"
    names = [way.name for way in record.ways]
    assert names[:4] == ["plain", "draft-dspark, 3", "draft-dspark, 2", "draft-dspark, 1"]
    assert {"draft-dspark, 3, p_min 0.5", "ngram-simple", "ngram-mod", "ngram-cache"} <= set(names)
    assert all(way.same_as_plain.identical == 2 for way in record.ways)
    assert {cost.tokens for cost in record.passes} == {1, 2, 3, 4} and {c.tokens for c in record.rounds} == {
        1,
        2,
        3,
    }
    assert record.advice in done.output and record.law.p_second_token == 1.0
    assert record.ratio_accepted_length is not None and record.outputs.drafted_vs_plain.identical == 2
    assert {server.model.name for server in asked} == {f"target-{project.target.digest[:12]}-f16.gguf"}


def test_an_export_that_failed_its_checks_is_not_served(project, monkeypatch):
    play(monkeypatch, accepted=0)
    path = Path("reports/export/dspark.json")
    record = json.loads(path.read_text())
    parity = record["engines"]["llamacpp"]["parity"]
    parity["passed"] = parity["checks"][0]["passed"] = False
    parity["checks"][0]["message"] = "layer ids: off by one"
    write_json(path, record)
    done = check()
    assert done.exit_code == 2 and "not the draft that was trained: layer ids: off by one" in done.output


def test_nothing_is_set_up_for_a_draft_without_an_export(project, monkeypatch):
    monkeypatch.setattr(
        "deepspec.serving.llamacpp.check.find_or_set_up", lambda: pytest.fail("set up in vain")
    )
    Path("reports/export/dspark.json").unlink()
    done = check()
    assert done.exit_code == 2 and "deepspec export --drafter dspark --to llamacpp" in done.output


@pytest.fixture(scope="module")
def llama_cpp():
    found = environment.find()
    return found or pytest.skip("llama.cpp is not set up; deepspec serve-check --engine llamacpp does it")


@pytest.mark.engine
@pytest.mark.parametrize("kind", ["dspark", "dflash", "eagle3", "lm"])
def test_the_pinned_wheel_loads_every_kind_of_draft_and_drafts_with_it(
    llama_cpp, kind, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    target = load_target(cached_target(layers=LAYERS), dtype="float32")
    draft = make_draft(tmp_path, target, kind)
    record = export(draft, ["llamacpp"], tmp_path / "exports", Options("f32", with_target=True))
    assert record["passed"], record["engines"]["llamacpp"]
    place = tmp_path / "exports" / "llamacpp"
    plain = Server(place / "target-f32.gguf", 256, 1, cache="f32")
    file = place / "draft-f32.gguf"
    drafting = replace(plain, kind=draft_kind(file), draft=file, tokens=draft.block_size)
    prompt = Prompt("task", "", target.chat_ids([{"role": "user", "content": "Count to ten."}]))
    (ours,) = generate(target, None, prompt.ids, max_new_tokens=24)
    for server, drafted in ((plain, False), (drafting, True)):
        with serving(llama_cpp, server, kind) as address:
            answer = LlamaCpp(address, target.stop_ids).answer(prompt, 24, drafted)
        assert answer.tokens == ours.tokens
        assert (answer.counts.drafts > 0) == drafted


@pytest.mark.engine
def test_llama_cpp_accepts_what_our_engine_accepts(llama_cpp, project):
    """A random draft of a random target, in float32: the same texts, and as many tokens accepted."""
    assert CliRunner().invoke(app, ["export", "--drafter", "dspark", "--to", "llamacpp"]).exit_code == 0
    done = check("--dtype", "float32")
    record = LlamaCppRecord.read("reports/serve/dspark-llamacpp.json")
    assert record.outputs.plain_vs_ours.identical == 2, done.output
    assert record.ratio_accepted_length == pytest.approx(1, abs=0.03)
