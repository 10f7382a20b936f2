"""The whole pipeline, as a user runs it, in a temporary clone: smoke profile, tiny random target."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
import yaml

from tests.e2e.clone import Clone, make_clone

pytestmark = pytest.mark.e2e
STAGES = ["target", "prompts", "generate", "validate", "train", "evaluate", "export", "report"]
DRAFTERS = ["lookup", "dspark", "dflash", "eagle3", "medusa", "lm"]


EACH = ("train", "evaluate", "export")  # for each drafter
FIRST = ["dspark"]  # made as a user makes it: a process a stage


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A finished pipeline of all drafters, the first from `dvc repro` itself."""
    clone = make_clone(tmp_path_factory.mktemp("clone"), "llama")
    clone.set("pipeline", FIRST)
    clone.runs.append(clone.repro_in_processes())
    clone.set("pipeline", DRAFTERS)
    clone.runs.append(clone.repro())
    return clone


def check_reports(clone: Clone, drafters: list[str]) -> None:
    """Every drafter was measured on every task at both temperatures, and none changed a token."""
    tasks = yaml.safe_load((clone.root / "params.yaml").read_text())["evaluate"]["tasks"]
    for name in drafters:
        record = clone.report(f"reports/eval/{name}.json")
        assert set(record["tasks"]) == {f"{task}@T={t}" for task in tasks for t in (0, 1)}
        assert all(entry["lossless"] for entry in record["tasks"].values())
        assert all(entry["tau"] >= 1 for entry in record["tasks"].values())
        assert clone.report("reports/metrics.json")[f"{name}.lossless"] == 1
        assert f"| {name} | {tasks[0]} | 0 |" in (clone.root / "reports/report.md").read_text()


def test_every_stage_runs_once_and_after_what_it_needs(clone: Clone):
    first, second = clone.runs
    check_order(first, STAGES, FIRST)
    # The target stage decides whether a drafter suits the target; nothing else is made again for a new one.
    check_order(second, ["target", *EACH, "report"], [name for name in DRAFTERS if name not in FIRST])


def check_order(ran: list[str], stages: list[str], drafters: list[str]) -> None:
    """These ran and no others; in which order the drafters follow one another is not said."""
    every = {f"{stage}@{name}" if stage in EACH else stage for stage in stages for name in drafters}
    assert sorted(ran) == sorted(every)
    for name in drafters:
        needed = [f"{stage}@{name}" if stage in EACH else stage for stage in stages if stage != "report"]
        assert [stage for stage in ran if stage in needed] == needed
    assert max(ran.index(f"evaluate@{name}") for name in drafters) < ran.index("report")


def test_every_draft_is_lossless_and_in_the_reports(clone: Clone):
    check_reports(clone, DRAFTERS)
    assert clone.report("reports/validation.json")["passed"] is True
    assert "dspark,12," in (clone.root / "reports/plots/training.csv").read_text()
    assert clone.report("reports/eval/dspark.json")["promise"]["greedy"]["blocks"] > 0
    page = (clone.root / "reports/report.html").read_text()
    assert all(f"acceptance-{name}-greedy" in page for name in DRAFTERS)
    assert list((clone.root / "reports/plots").glob("*.png"))


SERVED = {  # by the smoke profile's drafts
    "lookup": {"hf", "vllm", "sglang", "tgi"},
    "dspark": {"hf", "vllm", "speculators", "sglang", "llamacpp"},
    "dflash": {"hf", "vllm", "speculators", "sglang", "llamacpp"},
    "eagle3": {"hf", "vllm", "speculators"},  # two target layers: too few for SGLang
    "medusa": {"hf", "vllm", "tgi"},
    "lm": {"hf", "vllm", "sglang", "llamacpp"},
}


@pytest.mark.parametrize("name", DRAFTERS)
def test_every_export_is_the_draft_that_was_trained(clone: Clone, name: str):
    record = clone.report(f"reports/export/{name}.json")
    evaluation = clone.report(f"reports/eval/{name}.json")
    assert record["passed"] and record["draft_digest"] == evaluation["draft_digest"]
    engines = {engine: entry for engine, entry in record["engines"].items() if "refused" not in entry}
    assert set(engines) == SERVED[name]
    for entry in engines.values():
        assert all((clone.root / entry["path"] / file).is_file() for file in entry["files"])
        assert "## Evaluation" in (clone.root / entry["path"] / "README.md").read_text()


def test_cached_features_stay_out_of_the_dvc_cache_and_their_manifest_is_in_it(clone: Clone):
    """They are gigabytes that anyone can make again; what they were is on record."""
    features = list(clone.root.glob(".deepspec/features/**/*.safetensors"))
    kept = {file.parent.name + file.name for file in clone.root.glob(".dvc/cache/files/md5/??/*")}
    assert features and kept
    assert not kept & {md5(file) for file in features}
    assert all(md5(clone.root / f"data/features/{name}.json") in kept for name in DRAFTERS)


def md5(file: Path) -> str:
    return hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest()


def test_doctor_finds_nothing_to_mend_and_chat_answers_with_the_draft(clone: Clone):
    doctor = clone.ask("doctor")
    assert doctor.exit_code == 0, doctor.output
    chat = clone.ask("chat", "--max-new-tokens", "8", stdin="What is the sum?\nAnd then?\n")
    assert chat.exit_code == 0, chat.output
    assert len(re.findall(r"τ \d\.\d\d.* tokens", chat.stdout)) == 2


def test_two_processes_find_the_tau_of_one_and_so_does_a_second_run(clone: Clone):
    """Drafters measured together, in one process and in two, against the records of the pipeline."""
    params = yaml.safe_load((clone.root / "params.yaml").read_text())
    params["evaluate"] |= {"sweeps": None, "throughput": None}  # which are not compared
    (clone.root / "fewer.yaml").write_text(yaml.safe_dump(params))
    words = [
        "deepspec.stages.evaluate",
        "--params",
        "fewer.yaml",
        "--drafter",
        "dspark",
        "--drafter",
        "lookup",
    ]
    words += ["--output"]
    assert clone.call(*words, "one") == 0
    launch = ["torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m"]
    done = clone.run(*launch, *words, "two")
    assert done.returncode == 0, done.stderr[-3000:]
    for again, processes in (("one", 1), ("two", 2)):
        for name in ("dspark", "lookup"):
            first, second = (clone.report(f"{folder}/{name}.json") for folder in ("reports/eval", again))
            assert second["processes"] == processes
            for key, entry in first["tasks"].items():
                same = ("tau", "output_hashes", "accept_rate_by_position", "reached_by_position", "rounds")
                assert {k: entry[k] for k in same} == {k: second["tasks"][key][k] for k in same}
            records = [f"{folder}/{name}.json" for folder in ("reports/eval", again)]
            said = clone.ask("compare", *records)
            assert said.exit_code in (0, 1), said.output  # the clock may say anything here
            assert "tau at T" not in said.output


def test_a_second_repro_does_nothing(clone: Clone):
    assert clone.repro_in_processes() == []


def test_an_unknown_key_stops_the_pipeline_with_one_line(clone: Clone):
    before = (clone.root / "params.yaml").read_text()
    clone.set("evaluate.promts_per_task", 3)
    done = clone.run("dvc", "repro")
    (clone.root / "params.yaml").write_text(before)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert lines == [
        "error: params.yaml: unknown key 'evaluate.promts_per_task'; did you mean 'prompts_per_task'?"
    ]
    assert "Traceback" not in done.stderr


def test_a_new_learning_rate_reruns_training_and_what_follows(clone: Clone):
    clone.set("pipeline", ["dspark"])  # The target stage reads this too: what it suits is decided there.
    clone.repro()
    assert clone.planned() == []
    clone.set("train.lr", 5.0e-4)
    assert clone.repro("train@dspark") == ["train@dspark"]
    first, *others = clone.planned()
    assert first == "evaluate@dspark"
    assert sorted(others) == ["export@dspark", "report"]  # both read the record; DVC may run either first


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_a_target_of_another_family_works_unchanged(family: str, tmp_path: Path):
    clone = make_clone(tmp_path, family)
    clone.set("pipeline", ["dspark"])
    for measured_besides in ("sweeps", "throughput"):
        clone.set(f"evaluate.{measured_besides}", None)
    clone.repro()
    check_reports(clone, ["dspark"])
