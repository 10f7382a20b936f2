"""`deepspec track`: a result is logged whole and once, whatever was cut off before; only what `dvc repro` made."""

from __future__ import annotations

import http.server
import json
import os
import socket
import threading
import time
from pathlib import Path

import mlflow
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Experiment
from mlflow.exceptions import MlflowException
from mlflow.server.security_utils import INVALID_HOST_MSG

from deepspec.errors import DeepSpecError
from deepspec.tracking import store as storing
from deepspec.tracking.figures import flatten
from deepspec.tracking.result import model_name, read_result
from deepspec.tracking.store import connect
from deepspec.tracking.track import artifact_files, track
from deepspec.training.system import read_samples, samples_file, watched
from tests.tracked import NAME, lay_out, lock


def test_a_result_is_logged_whole_and_a_second_call_changes_nothing(tree: Path):
    result = read_result(NAME)
    with connect() as store:
        first = track(result, store)
        run = store.client.get_run(first.run_id)
        second = track(result, store)
        again = store.client.get_run(first.run_id)
        assert len(store.client.search_runs([store.experiment_id])) == 1
    assert first.new and not second.new and first.run_id == second.run_id
    assert again.to_dictionary() == run.to_dictionary()
    assert run.info.status == "FINISHED"

    params, metrics, tags = run.data.params, run.data.metrics, run.data.tags
    assert params["train.lr"] == "0.001" and params["drafter.type"] == "dspark"
    assert params["train.weight_decay"] == "0.0"  # a default
    assert metrics["eval/tau"] == 2.5 and metrics["eval/sums/T1/speedup_low"] == 1.9
    assert metrics["data/checks_failed"] == 0 and metrics["eval/lossless"] == 1
    assert tags["mlflow.source.git.commit"] == "c0ffee" and tags["version.torch"] == "2.13"
    assert "τ 2.50, 2.00×" in tags["mlflow.note.content"]
    assert tags["mlflow.source.name"] == f"deepspec evaluate --drafter {NAME}" and tags["mlflow.user"]
    assert tags["validation"] == "passed" and tags["data_digest"] == 64 * "a"
    client = MlflowClient()
    curve = client.get_metric_history(first.run_id, "train/heldout_tau")
    assert [(point.step, point.value) for point in curve] == [(20, 1.2), (40, 1.4), (60, 1.6)]
    acceptance = client.get_metric_history(first.run_id, "eval/talk/T0/accept_rate_by_position")
    assert [(point.step, point.value) for point in acceptance] == [(1, 0.8), (2, 0.5)]

    data = {one.dataset.name: one for one in run.inputs.dataset_inputs}
    assert set(data) == {"distill", "sums", "talk"}
    assert data["distill"].dataset.digest == 16 * "a"
    assert json.loads(data["distill"].dataset.profile)["rows"] == 123
    assert mlflow.data.get_source(data["distill"].dataset).uri == "data/distill/train.parquet"

    artifacts = tree / "mlruns/artifacts" / first.run_id / "artifacts"
    for name in ("dvc.lock", "params.yaml", "reports/report.html", f"reports/eval/{NAME}.prompts.jsonl"):
        assert (artifacts / name).read_bytes() == (tree / name).read_bytes()


def test_a_run_that_was_cut_off_is_completed_in_place(tree: Path, monkeypatch):
    def killed(*args, **options):
        raise KeyboardInterrupt

    result = read_result(NAME)
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch, connect() as store:
        patch.setattr(store.client.__class__, "log_artifact", killed)
        track(result, store)
    with connect() as store:
        (half,) = store.client.search_runs([store.experiment_id])
        assert half.info.status == "RUNNING"
        found = track(result, store)
        assert found.new and found.run_id == half.info.run_id
        assert store.client.get_run(found.run_id).info.status == "FINISHED"
        assert len(store.client.get_metric_history(found.run_id, "train/loss")) == 3  # none of them twice


def test_another_evaluation_is_another_run_and_another_drafter_is_none_of_its_business(
    tree: Path, tiny_target: Path
):
    first = read_result(NAME)
    assert "train@other" not in first.stages and "generate" in first.stages
    (tree / "data/drafts/other").mkdir()
    (tree / "data/drafts/other/config.json").write_text("{}")
    lock(tree)
    assert read_result(NAME).key == first.key
    lay_out(tree, tiny_target, speedup=1.9)
    second = read_result(NAME)
    assert second.key != first.key
    with connect() as store:
        assert len({track(result, store).run_id for result in (first, second)}) == 2


def test_parameters_are_those_of_the_lock_not_of_an_edited_file(tree: Path):
    text = (tree / "params.yaml").read_text()
    (tree / "params.yaml").write_text(text.replace("steps: 12", "steps: 99"))
    assert read_result(NAME).params.train.steps == 12


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        (f"reports/eval/{NAME}.json", "{}", "changed since the stage in dvc.lock wrote it"),
        (f"data/drafts/{NAME}/config.json", "{}", "was evaluated"),
        (f"reports/train/{NAME}.jsonl", None, "no such file; get it with"),
        ("reports/validation.json", '{"passed": false, "rows": 1, "checks": []}', "changed since the stage"),
        ("reports/report.html", "<html>of another run</html>", "changed since the stage"),
        ("data/distill/manifest.json", '{"digest": "another", "target": "x"}', "changed since the stage"),
        (f"data/drafts/{NAME}/model.safetensors", None, "was evaluated"),
        ("dvc.lock", None, "no such file; run `dvc repro` first"),
        ("dvc.lock", "[]", "not a DVC lock file"),
        ("dvc.lock", "stages: {}", f"stage train@{NAME} has not run"),
        ("dvc.lock", "stages: {train: ", "not a DVC lock file"),
        ("dvc.lock", f"stages: {{train@{NAME}: null}}", "not a DVC lock file"),
        ("dvc.lock", f"stages: {{train@{NAME}: {{outs: [5]}}}}", "not a DVC lock file"),
    ],
)
def test_what_dvc_did_not_make_is_refused(tree: Path, path, content, message):
    (tree / path).unlink()
    if content is not None:
        (tree / path).write_text(content)
    with pytest.raises(DeepSpecError, match=message):
        read_result(NAME)


@pytest.mark.parametrize("path", ["dvc.lock", f"reports/eval/{NAME}.json", f"reports/train/{NAME}.jsonl"])
def test_what_cannot_be_read_is_told_in_one_line(tree: Path, path):
    (tree / path).unlink()
    (tree / path).symlink_to(tree / path)  # root reads everything else
    with pytest.raises(DeepSpecError, match="cannot be read: Too many levels of symbolic links"):
        read_result(NAME)


def test_a_stage_that_read_another_file_than_there_is_now_is_refused(tree: Path):
    """Data that were made again and a draft that was trained before: both are in dvc.lock."""
    lock_file = yaml.safe_load((tree / "dvc.lock").read_text())
    train = lock_file["stages"][f"train@{NAME}"]
    train["deps"].append({"path": "data/distill", "md5": "0.dir"})
    (tree / "dvc.lock").write_text(yaml.safe_dump(lock_file))
    with pytest.raises(DeepSpecError, match=f"train@{NAME} read another data/distill than there is now"):
        read_result(NAME)


def test_a_file_that_no_stage_names_is_not_taken_for_a_result(tree: Path):
    (tree / "reports/notes.html").write_text("mine")
    files = {str(path) for path in artifact_files(read_result(NAME))}
    assert "reports/report.html" in files and "reports/notes.html" not in files


def test_lists_and_mappings_of_odd_keys_are_one_parameter():
    section = {"mix": {"jsonl:a.jsonl": 0.5, "seed": 1.0}, "loss": {"ce": 0.1}, "tasks": ["a"], "none": None}
    assert dict(flatten(section, "p.")) == {
        "p.mix": '{"jsonl:a.jsonl": 0.5, "seed": 1.0}',
        "p.loss.ce": "0.1",
        "p.tasks": '["a"]',
        "p.none": "null",
    }


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("embedded:smollm2-135m-instruct", "deepspec-smollm2-135m-instruct-dspark"),
        ("Qwen/Qwen3-0.6B", "deepspec-qwen3-0.6b-dspark"),
        ("models/My Model/", "deepspec-my-model-dspark"),
    ],
)
def test_a_model_is_named_by_target_and_drafter(source, expected):
    assert model_name(source, "dspark") == expected


def sampled(count: int) -> None:
    """Wait for as many samples; the test's own time limit ends this."""
    while samples_file(NAME).read_text().count("\n") < count:
        time.sleep(0.01)


def test_samples_of_the_machine_are_logged_with_the_draft_that_came_of_them(tree: Path):
    result = read_result(NAME)
    with watched(NAME, result.draft, every_s=0.01):
        sampled(2)
    samples = read_samples(samples_file(NAME), result.record.draft_digest)
    assert len(samples) >= 2 and all(sample["process_memory_megabytes"] > 1 for sample in samples)
    with connect() as store:
        found = track(result, store)
        history = store.client.get_metric_history(found.run_id, "system/process_memory_megabytes")
    assert [(m.step, m.timestamp, m.value) for m in history] == [
        (i, sample["timestamp_ms"], sample["process_memory_megabytes"]) for i, sample in enumerate(samples)
    ]


def test_samples_of_another_draft_or_an_unfinished_training_are_not_taken(tree: Path):
    draft = read_result(NAME).draft
    with pytest.raises(KeyboardInterrupt), watched(NAME, draft, every_s=0.01):
        sampled(1)
        raise KeyboardInterrupt
    digest = read_result(NAME).record.draft_digest
    assert samples_file(NAME).read_text() and read_samples(samples_file(NAME), digest) == []
    with watched(NAME, draft):
        pass
    assert read_samples(samples_file(NAME), "another") == []
    assert read_samples(Path("nothing.jsonl"), digest) == []


def test_only_the_first_of_several_processes_samples(tree: Path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with watched(NAME, tree):
        pass
    assert not samples_file(NAME).exists()


@pytest.mark.parametrize("uri", ["file:./mlruns", "./mlruns", "postgresql://me:secret@host/db"])
def test_a_store_that_no_proxy_stands_before_is_refused(uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(DeepSpecError, match="name a server") as caught, connect():
        pass
    assert "secret" not in str(caught.value)


def test_a_server_that_is_not_there_is_one_line_at_once(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    with (
        pytest.raises(DeepSpecError, match=r"no MLflow server answers at http://127.0.0.1.*refused"),
        connect(),
    ):
        pass


@pytest.mark.parametrize("location", ["/srv/mlruns/1", "file:///srv/mlruns/1", "mlruns/1"])
def test_a_path_of_the_servers_own_machine_is_refused_as_a_place_for_artifacts(location):
    def check(location: str) -> None:
        storing._check_location(Experiment("1", "deepspec", location, "active"), "http://host")

    check("mlflow-artifacts:/1")
    check("s3://bucket/1")
    with pytest.raises(DeepSpecError, match="--artifacts-destination"):
        check(location)


def test_a_server_that_refuses_its_name_is_told_how_to_allow_it():
    refusal = MlflowException(f"API request failed with error code 403. Response body: {INVALID_HOST_MSG!r}")
    assert "--allowed-hosts" in storing._reason(refusal)


def test_links_have_the_address_that_a_browser_reaches(monkeypatch):
    """In a container the server is `http://mlflow:5000`, which no browser of the host knows."""
    store = storing.Store("http://mlflow:5000", MlflowClient("http://mlflow:5000"), "1")
    assert store.runs == "http://mlflow:5000/#/experiments/1/runs"
    monkeypatch.setenv("DEEPSPEC_MLFLOW_URL", "http://localhost:5001/")
    assert store.link("models", "m") == "http://localhost:5001/#/models/m"


def test_what_answers_and_is_no_mlflow_server_is_named(monkeypatch):
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as other:
        monkeypatch.setattr(
            http.server.BaseHTTPRequestHandler, "do_GET", lambda self: self.send_error(404), raising=False
        )
        threading.Thread(target=other.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{other.server_port}")
        with pytest.raises(DeepSpecError, match="is no MLflow server"), connect():
            pass
        other.shutdown()


def test_connecting_turns_telemetry_off(tree: Path, monkeypatch):
    for name in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        monkeypatch.delenv(name)
    with connect():
        assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == os.environ["DO_NOT_TRACK"] == "true"
