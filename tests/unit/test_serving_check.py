"""`deepspec serve-check` from the command line, against engines played on the loopback interface."""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from deepspec.cli import app
from deepspec.decoding.engine import generate
from deepspec.drafters.checkpoint import draft_digest
from deepspec.errors import DeepSpecError
from deepspec.files import write_json
from deepspec.serving.environment import Environment
from deepspec.target.model import load_target
from tests.engines import FakeEngine

ROOT = Path(__file__).parents[2]
K, TOKENS = 3, 9
WORK = ("--tasks", "word_problems", "--prompts", "2", "--max-new-tokens", str(TOKENS))
LOOKUP = {"architectures": ["DeepSpecLookup"], "block_size": K, "min_match": 2}
CPU = Environment(Path("python"), "0.32.0", Path("nowhere"), gpu=False)


@pytest.fixture
def project(tiny_target, tmp_path, monkeypatch):
    """A project with a draft that is the target itself: each of its tokens stands."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("deepspec.serving.environment.CACHED", tmp_path / "cache" / "vllm")
    for name in ("DEEPSPEC_VLLM_PYTHON", "DEEPSPEC_TASKS_DIR"):
        monkeypatch.delenv(name, raising=False)
    Path("data").mkdir()
    Path("data/target").symlink_to(tiny_target)
    shutil.copy(ROOT / "params.smoke.yaml", "params.yaml")
    draft = Path("data/drafts/twin")
    shutil.copytree(tiny_target, draft)
    write_json(draft / "config.json", json.loads((draft / "config.json").read_text()) | {"block_size": K})
    return tmp_path


@pytest.fixture
def target(tiny_target):
    return load_target(tiny_target)


def check(*words):
    return CliRunner().invoke(app, ["serve-check", *words])


def ask(url, *words, engine="vllm", drafter="twin"):
    return check("--engine", engine, "--drafter", drafter, "--base-url", url, *WORK, *words)


def as_target(target):
    def answer(ids, most):
        (out,) = generate(target, None, ids, max_new_tokens=most)
        return out.tokens

    return answer


@pytest.mark.parametrize("engine", ["vllm", "sglang", "tgi"])
def test_an_engine_that_accepts_as_much_passes(project, target, engine):
    def encode(text):
        return target.tokenizer(text, add_special_tokens=False)["input_ids"]

    with (
        FakeEngine(engine, as_target(target), accepted=K, drafted=K, encode=encode) as served,
        FakeEngine(engine, as_target(target), accepted=None, encode=encode) as plain,
    ):
        done = ask(served.url, "--plain-url", plain.url, engine=engine)
    assert done.exit_code == 0, done.output
    record = json.loads((project / f"reports/serve/twin-{engine}.json").read_text())
    assert record["ratio_accepted_length"] == pytest.approx(1)
    assert record["served"]["mean_accepted_length"] == record["ours"]["mean_accepted_length"] == 1 + K
    assert record["served"]["speedup"] == pytest.approx(1)  # the played engine always takes as long
    assert record["outputs"]["plain_vs_ours"]["identical"] == record["prompts"] == 2
    assert record["draft_digest"] == draft_digest(project / "data/drafts/twin")
    assert record["target_digest"] == target.digest and record["serve_version"] == "1"
    assert record["failures"] == [] and "twin" in done.output


def test_an_engine_s_own_lookup_is_reported_and_not_held_to_ours(project, target):
    write_json("data/drafts/lookup/config.json", LOOKUP)
    with FakeEngine("vllm", as_target(target), accepted=0, drafted=K) as served:
        done = ask(served.url, drafter="lookup")
    assert done.exit_code == 0, done.output
    assert json.loads(Path("reports/serve/lookup-vllm.json").read_text())["failures"] == []


def test_a_draft_that_vllm_does_not_start_costs_no_other_its_record(project, target, monkeypatch):
    monkeypatch.setattr("deepspec.serving.check.find_or_set_up", lambda: CPU)
    shutil.copytree("data/drafts/twin", "data/drafts/other")
    for name in ("twin", "other"):
        digest = draft_digest(Path("data/drafts") / name)
        entry = {"engines": {"vllm": {"path": f"data/drafts/{name}"}}, "draft_digest": digest}
        write_json(f"reports/export/{name}.json", entry)

    @contextmanager
    def serving(environment, target_dir, dtype, length, speculative, name):
        if name == "other":
            raise DeepSpecError("vLLM ended while it started: no kernel")
        with FakeEngine("vllm", as_target(target), accepted=K if speculative else None, drafted=K) as engine:
            yield engine.url

    monkeypatch.setattr("deepspec.serving.engines.serving", serving)
    done = check("--drafter", "other", "--drafter", "twin", *WORK)
    assert done.exit_code == 1 and "other: vLLM ended while it started: no kernel" in done.output
    assert json.loads(Path("reports/serve/twin-vllm.json").read_text())["failures"] == []
    assert not Path("reports/serve/other-vllm.json").exists()


def test_nothing_is_set_up_for_a_draft_that_has_no_export(project, monkeypatch):
    monkeypatch.setattr("deepspec.serving.check.find_or_set_up", lambda: pytest.fail("set up in vain"))
    done = check("--drafter", "twin")
    assert done.exit_code == 2 and "no export of twin for vLLM" in done.output


def test_an_engine_that_accepts_less_fails_with_one_line(project, target):
    with FakeEngine("vllm", as_target(target), accepted=1, drafted=K) as served:
        done = ask(served.url)
    assert done.exit_code == 1
    (line,) = [line for line in done.output.splitlines() if line.startswith("failed:")]
    assert "vllm accepts 2.00 tokens a verification where our engine accepts 4.00" in line
    assert "docs/deploy.md" in line
    assert json.loads((project / "reports/serve/twin-vllm.json").read_text())["failures"]


def test_another_model_is_not_measured(project):
    with FakeEngine("vllm", lambda ids, most: [3] * most) as served:
        done = ask(served.url)
    assert done.exit_code == 2 and "another model, tokenizer or chat template" in done.output
    assert not (project / "reports/serve").exists()


def test_prompts_are_tokens_of_the_target_s_own_template(project, target):
    with FakeEngine("vllm", as_target(target), accepted=K, drafted=K) as served:
        ask(served.url)
        asked = {tuple(body["prompt"]) for body in served.requests}
    assert len(asked) == 2
    assert all("<|im_start|>assistant" in target.tokenizer.decode(list(ids)) for ids in asked)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--engine", "vlm"], "unknown engine 'vlm'; did you mean 'vllm'"),
        (["--engine", "sglang", "--drafter", "twin"], "name its address with --base-url"),
        (["--base-url", "http://x"], "serves one draft: name it with --drafter"),
        (["--drafter", "twin", "--prompts", "0"], "--prompts must be >= 1"),
        (["--drafter", "nobody"], "no such draft: nobody"),
        (["--exported", "x"], "directory of one draft: name it with --drafter"),
        ([], "no drafter of the pipeline has an export that vLLM serves here"),
    ],
)
def test_a_mistake_is_one_line(project, monkeypatch, words, message):
    monkeypatch.setattr("deepspec.serving.check.find_or_set_up", lambda: CPU)
    done = check(*words)
    assert done.exit_code == 2 and message in done.output


def test_more_tokens_than_the_draft_has_are_refused(project):
    done = ask("http://127.0.0.1:9", "--speculative-tokens", "8")
    assert done.exit_code == 2 and "drafts at most 3 tokens, 8 are asked for" in done.output


@pytest.mark.parametrize(
    ("export", "message"),
    [
        (None, "export it first (deepspec export --drafter twin --to vllm)"),
        ({"engines": {"vllm": {"refused": "trees"}}}, "cannot be served by vLLM: trees"),
        (
            {"engines": {"vllm": {"path": "x"}}, "draft_digest": "other"},
            "of an earlier draft; export it again",
        ),
    ],
)
def test_what_vllm_loads_is_the_export_of_this_very_draft(project, monkeypatch, export, message):
    monkeypatch.setattr("deepspec.serving.check.find_or_set_up", lambda: CPU)
    if export:
        digest = draft_digest(project / "data/drafts/twin")
        write_json(project / "reports/export/twin.json", {"draft_digest": digest} | export)
    done = check("--drafter", "twin")
    assert done.exit_code == 2 and message in done.output


def test_dspark_needs_a_gpu(project, monkeypatch):
    monkeypatch.setattr("deepspec.serving.check.find_or_set_up", lambda: CPU)
    write_json(project / "exported" / "config.json", {"architectures": ["Qwen3DSparkModel"]})
    done = check("--drafter", "twin", "--exported", "exported")
    assert done.exit_code == 2 and "vLLM serves dspark on a GPU only" in done.output


def test_a_block_drafter_drafts_its_whole_block(project, monkeypatch):
    monkeypatch.setattr("deepspec.serving.check.find_or_set_up", lambda: CPU)
    write_json(project / "exported" / "config.json", {"architectures": ["DFlashDraftModel"]})
    done = check("--drafter", "twin", "--exported", "exported", "--speculative-tokens", "2")
    assert done.exit_code == 2 and "a block is drafted whole, 3 tokens" in done.output


def test_a_target_that_this_engine_is_not_to_load_is_not_loaded(project, monkeypatch):
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["target"]["engine"], params["train"]["real_decode"] = "vllm", False
    monkeypatch.setattr("deepspec.serving.check.load_target", lambda *_, **__: pytest.fail("it is loaded"))
    Path("params.yaml").write_text(yaml.safe_dump(params))
    done = check("--drafter", "twin", *WORK)
    assert done.exit_code == 2 and "deepspec evaluate measures drafts in vLLM alone" in done.output, (
        done.output
    )
