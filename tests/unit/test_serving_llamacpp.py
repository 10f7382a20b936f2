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
from deepspec.serving.protocols import Counts, Prompt, Turn
from deepspec.target.model import Target, load_target
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


LAWS = [[0.5, 0.3, 0.1, 0.05, 0.05], [0.35, 0.35, 0.2, 0.1], [0.7, 0.1, 0.1, 0.1], [0.2] * 5]


def drawn(laws, random, count):
    return [random.choice(len(of), size=count, p=of).tolist() for of in laws]


def moved(of, change):
    """The likeliest token takes a share of the law from the others."""
    best = int(np.argmax(of))
    kept = [share * (1 - change / (1 - of[best])) for share in of]
    return [of[best] + change if i == best else share for i, share in enumerate(kept)]


def test_a_change_of_the_law_is_seen_as_surely_as_is_asked_for(monkeypatch):
    monkeypatch.setattr(law, "PERMUTATIONS", 2000)
    random = np.random.default_rng(1)
    count, power = law.draws_for(drawn(LAWS, random, 64))
    assert power >= law.POWER and law.power(drawn(LAWS, random, 64), 25) < 0.5, "25 draws do not see it"
    first = [drawn(LAWS, random, count) for _ in range(40)]
    same = [law.p_value(one, drawn(LAWS, random, count)) for one in first]
    other = [[moved(of, law.CHANGE) for of in LAWS]] * 40
    seen = [law.p_value(one, drawn(of, random, count)) for one, of in zip(first, other, strict=True)]
    assert min(same) >= law.LEVEL
    assert sum(p < law.LEVEL for p in seen) >= 0.8 * law.POWER * 40


def test_a_larger_change_and_more_draws_are_seen_more_surely():
    sample = drawn(LAWS, np.random.default_rng(2), 64)
    powers = [law.power(sample, draws, change) for draws, change in ((50, 0.1), (50, 0.3), (200, 0.3))]
    assert powers == sorted(powers) and powers[0] < 0.5 < powers[-1]


def test_of_laws_that_no_change_can_sharpen_nothing_is_seen():
    assert law.draws_for([[7] * 64]) == (law.DRAWS[-1], 0.0)


def test_a_p_value_is_the_share_of_splits_that_are_as_uneven():
    assert law.p_value([["a", "a"]], [["b", "b"]]) == pytest.approx(1 / 3, abs=0.02)


def test_the_law_looks_at_second_tokens_and_lengths():
    answers = [[[7, 8, 9], [7]], [[7, 9]]]
    assert law.second_tokens(answers) == [[8, -1], [9]]
    assert law.answer_lengths(answers) == [[3, 1], [2]]


PLAIN = Server(Path("target.gguf"), 128, 2)
DRAFT = replace(PLAIN, kind="draft-dspark", draft=Path("draft.gguf"), tokens=5)


class Machine:
    """Servers that take so many plain passes a turn; every answer finds the machine as slow as `slowness` says."""

    def __init__(self, slowness):
        self.slowness, self.asked = slowness, 0

    def ask(self, passes, drafted):
        def turns():
            self.asked += 1
            seconds = 0.010 * passes * self.slowness(self.asked)
            return [Turn(drafted, 0, seconds)] * 4 + [Turn(0, 0, 9.0)] * bool(drafted)

        return turns

    def costs(self, lengths=(1, 2, 3, 5)):
        """A drafted token makes a pass 0.1 longer, and takes 0.2 to make."""
        lookups = {k: self.ask(1 + 0.1 * k, k) for k in lengths}
        return costs.measure(self.ask(1, 0), lookups, {k: self.ask(1 + 0.3 * k, k) for k in lengths})


@pytest.mark.parametrize(
    "slowness",
    [lambda asked: 1, lambda asked: 1 + asked / 20, lambda asked: 3 if asked % 9 == 0 else 1],
    ids=["quiet", "slower and slower", "now and then"],
)
def test_costs_are_right_whatever_else_the_machine_does(slowness):
    found = Machine(slowness).costs()
    passes = {n: ratio.value for n, ratio in found.passes.items()}
    rounds = {k: ratio.value for k, ratio in found.rounds.items()}
    assert passes == pytest.approx({2: 1.1, 3: 1.2, 4: 1.3, 6: 1.5}, rel=1e-6)
    assert rounds == pytest.approx({1: 1.3, 2: 1.6, 3: 1.9, 5: 2.5}, rel=1e-6)


def test_the_interval_of_a_cost_tells_an_unsteady_machine():
    quiet, loaded = (costs.Ratio.of([1.5 + 0.01 * i * by for i in range(-4, 5)]) for by in (1, 10))
    assert quiet.value == loaded.value == 1.5
    assert loaded.bounds[0] < quiet.bounds[0] <= 1.5 <= quiet.bounds[1] < loaded.bounds[1]


def test_answers_too_short_to_time_are_an_error():
    def silent():
        return []

    with pytest.raises(DeepSpecError, match="too few tokens to time a pass"):
        costs.measure(silent, {1: silent}, {1: silent})


@pytest.mark.parametrize(
    ("by_position", "drafted", "says"),
    [((10, 10, 10, 10, 10), 5,
      "draft 5: 6.00 tokens a round that takes 2.50 plain passes: 2.40× (2.40–2.40) expected"),
     ((8, 1, 0, 0, 0), 1, "draft 1: 1.80 tokens"),
     ((1, 0, 0, 0, 0), 1, "do not draft here: at best 1 drafted, 1.10 tokens a round that takes 1.30 plain passes")],
)  # fmt: skip
def test_the_advice_follows_from_acceptance_and_costs(by_position, drafted, says):
    found = Machine(lambda asked: 1).costs()
    choices = costs.choices(found, Counts(10, 50, sum(by_position), by_position))
    best = max(choices, key=lambda choice: choice.speedup)
    assert best.drafted == drafted and costs.advice(choices, found).startswith(says)


def test_the_advice_does_not_pretend_to_know():
    found = costs.Costs(0.01, {}, {2: costs.Ratio(1.3, (1.1, 1.5))})
    (choice,) = costs.choices(found, Counts(10, 20, 4, (3, 1)))
    assert costs.advice([choice], found).startswith("drafting gains or loses little here: at best 2 drafted")


def test_a_llama_server_of_ones_own_gets_the_same_as_flags():
    words = " ".join(replace(DRAFT, least=0.5, cache="f32").flags(8080))
    for flags in (
        "--spec-type draft-dspark", "--spec-draft-n-max 5 --spec-draft-p-min 0.5", "-ctk f32 -ctv f32", "--port 8080",
        "--fit off --cache-ram 0",
        f"-md {Path('draft.gguf').resolve()}",
    ):  # fmt: skip
        assert flags in words
    assert "--spec" not in " ".join(PLAIN.flags(1))
    assert "--spec-ngram-simple-size-m 4" in " ".join(
        replace(PLAIN, kind="ngram-simple", match=1, tokens=4).flags(1)
    )
    both = " ".join(replace(DRAFT, kind="ngram-simple,draft-dspark").flags(1))
    assert "--spec-type ngram-simple,draft-dspark --spec-draft-n-max 5" in both


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


class Sampling(FakeEngine):
    """Draws the second token from a law where it is asked to sample."""

    law = (0.5, 0.3, 0.2)

    def _llamacpp_post(self, path, body):
        if body["temperature"] == 0:
            return super()._llamacpp_post(path, body)
        second = np.random.default_rng(body["seed"]).choice(3, p=self.law)
        return {"tokens": [9, int(second), 10][: body["n_predict"]], "content": "..."}


def play(monkeypatch, accepted: int, law_with_draft=Sampling.law) -> list[Server]:
    """Plays every server: the target's own tokens, and so many drafted ones accepted."""
    asked = []
    target = load_target("data/target", dtype="float32")

    def answer(ids, most):
        (out,) = generate(target, None, ids, max_new_tokens=most)
        return out.tokens

    @contextmanager
    def played(environment, server, name):
        asked.append(server)
        with Sampling("llamacpp", answer, accepted if server.kind else None, server.tokens or K) as engine:
            engine.law = law_with_draft if server.draft else Sampling.law
            yield engine.url

    monkeypatch.setattr(costs, "TURNS", costs.LEAST)
    monkeypatch.setattr("deepspec.serving.llamacpp.check.PILOT", 16)
    monkeypatch.setattr("deepspec.serving.llamacpp.check.serving", played)
    monkeypatch.setattr(
        "deepspec.serving.llamacpp.check.find_or_set_up", lambda: Environment("xllamacpp 1", "")
    )
    return asked


def test_a_check_writes_ways_costs_advice_and_law(project, monkeypatch):
    asked = play(monkeypatch, accepted=0)
    done = check()
    assert done.exit_code == 0, done.output
    record = LlamaCppRecord.read("reports/serve/dspark-llamacpp-f16.json")
    assert record.drafter == "dspark" and record.method == "draft-dspark" and record.precision == "f16"
    names = [way.name for way in record.ways]
    assert names == [
        "plain",
        *(f"draft-dspark, {k}" for k in (3, 2, 1)),
        *(f"draft-dspark, {k}, p_min 0.5" for k in (3, 2, 1)),
        *("ngram-simple", "ngram-mod", "ngram-cache"),
        "ngram-simple + draft-dspark, 2",
        *("DeepSpec, plain", "DeepSpec, 3"),
    ]
    assert all(way.same_as_plain.identical == 2 for way in record.ways)
    assert all(way.tokens_per_second for way in record.ways)
    assert [cost.tokens for cost in record.passes] == [2, 3, 4]
    assert [cost.tokens for cost in record.rounds] == [1, 2, 3]
    assert record.advice in done.output and record.fastest in done.output
    assert record.law.draws == 3 and record.law.p_second_token >= law.LEVEL
    assert record.ratio_accepted_length is not None and record.outputs.drafted_vs_plain.identical == 2
    assert {server.model.name for server in asked} == {f"target-{project.target.digest[:12]}-f16.gguf"}


@pytest.mark.parametrize(("dtype", "status"), [("f16", 1), ("q8_0", 0)])
def test_a_quantised_target_is_another_one_to_whose_lengths_ours_are_not_held(
    project, monkeypatch, dtype, status
):
    play(monkeypatch, accepted=0)
    monkeypatch.setattr("deepspec.serving.record.LEAST_RATIO", 9.0)
    done = check("--lengths-only", "--draws", "0", "--dtype", dtype)
    assert done.exit_code == status, done.output
    record = LlamaCppRecord.read(f"reports/serve/dspark-llamacpp-{dtype}.json")
    said = record.failures if status else record.warnings
    assert any("at least 9.0 is asked for" in line for line in said)
    assert status or (not record.failures and any("--dtype f16 tells" in line for line in said))


def test_lengths_alone_need_two_servers(project, monkeypatch):
    asked = play(monkeypatch, accepted=0)
    done = check("--lengths-only", "--draws", "0")
    record = LlamaCppRecord.read("reports/serve/dspark-llamacpp-f16.json")
    assert done.exit_code == 0, done.output
    assert [server.kind for server in asked] == ["", "draft-dspark"]
    assert [way.name for way in record.ways] == ["plain", "draft-dspark, 3"]
    assert record.plain_seconds is None and record.passes == record.expected == []
    assert record.advice == "costs were not measured" and record.ratio_accepted_length is not None


def test_an_engine_that_samples_another_law_with_the_draft_fails(project, monkeypatch):
    play(monkeypatch, accepted=0, law_with_draft=(0.75, 0.15, 0.1))
    done = check("--draws", "100")
    assert done.exit_code == 1, done.output
    assert "llama.cpp samples another law with the draft at T = 1: p = " in done.output
    play(monkeypatch, accepted=0)
    assert check("--draws", "100").exit_code == 0


def test_draws_follow_from_our_engines_answers(project, monkeypatch):
    play(monkeypatch, accepted=0)
    monkeypatch.setattr(law, "DRAWS", (2, 3))
    done = check("--draws", "0")
    assert LlamaCppRecord.read("reports/serve/dspark-llamacpp-f16.json").law is None, done.output
    asked = [word for word in WORK if word not in ("--draws", "3")]
    done = CliRunner().invoke(app, ["serve-check", "--engine", "llamacpp", "--drafter", "dspark", *asked])
    found = LlamaCppRecord.read("reports/serve/dspark-llamacpp-f16.json").law
    assert done.exit_code == 0 and found.draws in law.DRAWS and found.change == law.CHANGE
    assert f"with probability {found.power:.2f}" in done.output


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


def exported_pair(kind: str, place: Path) -> tuple[Target, Server, Server]:
    """A random target and an untrained draft of it in float32, and how llama.cpp serves the one and both."""
    target = load_target(cached_target(layers=LAYERS), dtype="float32")
    draft = make_draft(place, target, kind)
    record = export(draft, ["llamacpp"], place / "exports", Options("f32", with_target=True))
    assert record["passed"], record["engines"]["llamacpp"]
    files = place / "exports" / "llamacpp"
    plain = Server(files / "target-f32.gguf", 256, 1, cache="f32")
    file = files / "draft-f32.gguf"
    return target, plain, replace(plain, kind=draft_kind(file), draft=file, tokens=draft.block_size)


@pytest.mark.engine
@pytest.mark.parametrize("kind", ["dspark", "dflash", "eagle3", "lm"])
def test_the_pinned_wheel_loads_every_kind_of_draft_and_drafts_with_it(
    llama_cpp, kind, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    target, plain, drafting = exported_pair(kind, tmp_path)
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
    record = LlamaCppRecord.read("reports/serve/dspark-llamacpp-f32.json")
    assert record.outputs.plain_vs_ours.identical == 2, done.output
    assert record.ratio_accepted_length == pytest.approx(1, abs=0.03)


@pytest.mark.engine
def test_a_law_that_is_changed_in_llama_cpp_is_seen(llama_cpp, tmp_path, monkeypatch):
    """The random law is flat: what is planted is another temperature in the server with the draft."""
    monkeypatch.chdir(tmp_path)
    target, plain, drafting = exported_pair("dspark", tmp_path)
    asked = ("Count to ten.", "Name a colour.")
    prompts = [Prompt("law", "", target.chat_ids([{"role": "user", "content": text}])) for text in asked]

    def second(client, temperature, odd):
        drawn = [
            [client.sample(prompt, 6, 1 + 2 * i + odd, temperature) for i in range(100)] for prompt in prompts
        ]
        return law.second_tokens(drawn)

    with serving(llama_cpp, plain, "plain") as one, serving(llama_cpp, drafting, "draft") as other:
        without = second(LlamaCpp(one, target.stop_ids), 1.0, 0)
        drafted = LlamaCpp(other, target.stop_ids)
        assert law.p_value(without, second(drafted, 1.0, 1)) >= law.LEVEL
        assert law.p_value(without, second(drafted, 0.25, 1)) < law.LEVEL
