"""The registry with a real MLflow server: from a result to a champion that another process loads and asks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from typer.testing import CliRunner

from deepspec import generate, load_target
from deepspec.cli import app
from deepspec.tracking import trial
from tests.tracked import MODEL, ROOT, ask_here, lay_out

pytestmark = pytest.mark.e2e
PROMPTS = ["What is the sum of 2 and 3?", "Write a story about a cat.", "Why?"]
TOKENS = 24
LOADS = """
import json, sys

def only_here(event, args):
    host = {"socket.getaddrinfo": lambda: args[0], "socket.connect": lambda: args[1][0]}.get(event, lambda: None)()
    if host not in (None, "127.0.0.1"):
        raise SystemExit(f"reached for {host}")

sys.addaudithook(only_here)
import mlflow, pandas
model = mlflow.pyfunc.load_model(sys.argv[1])
prompts = pandas.DataFrame({"prompt": json.loads(sys.argv[2])})
found = model.predict(prompts, params={"max_new_tokens": int(sys.argv[3])})
import deepspec
print(json.dumps({"text": list(found["text"]), "tau": list(found["tau"]), "code": deepspec.__file__}))
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(empty_store, folder / "mlflow.db")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    words += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    words += ["--artifacts-destination", str(folder / "artifacts")]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *words],
            stdout=log,
            stderr=log,
            cwd=folder,
            start_new_session=True,
        )
        try:
            _wait(f"http://127.0.0.1:{port}", process, folder / "log")
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # asked nicely, it takes its time
            process.wait()


def _wait(uri: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(f"{uri}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(log.read_text())


def run(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(words))
    return result.exit_code, " ".join(result.output.split())


def test_a_draft_becomes_the_champion_and_another_process_gets_the_targets_own_text(
    server: str, tmp_path: Path, tiny_target: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    lay_out(tmp_path, tiny_target)
    for _ in range(2):
        code, text = run("track")
        assert code == 0 and f"{server}/#/experiments/" in text
    assert "nothing was changed" in text
    assert run("register")[0] == 0
    assert run("promote")[0] == 0

    monkeypatch.setattr(trial, "ask_in_fresh_process", ask_here)  # once was enough
    lay_out(tmp_path, tiny_target, variant="worse", accepted=1)
    assert run("register")[0] == 0
    code, text = run("promote")
    assert code == 1 and f"refused: {MODEL} version 2: tau_not_worse" in text
    lay_out(tmp_path, tiny_target, variant="better", accepted=4, gain=2.5)
    assert run("register")[0] == 0 and run("promote")[0] == 0
    client = MlflowClient(server)
    assert client.get_registered_model(MODEL).aliases == {"champion": "3", "previous": "1"}
    assert run("promote", "--rollback")[0] == 0
    assert client.get_registered_model(MODEL).aliases == {"champion": "1", "previous": "3"}

    # Whatever a client is told of an artifact's place goes through the server.
    (experiment,) = client.search_experiments(filter_string="name = 'deepspec'")
    runs = client.search_runs([experiment.experiment_id])
    models = client.search_logged_models([experiment.experiment_id])
    assert len(runs) == len(models) == 3
    places = [experiment.artifact_location, *(run.info.artifact_uri for run in runs)]
    places += [model.artifact_location for model in models]
    places += [client.get_model_version_download_uri(MODEL, version) for version in "123"]
    assert all(place.startswith("mlflow-artifacts:/") for place in places)

    found = ask(f"models:/{MODEL}@champion")
    target = load_target(tiny_target)
    plain = [
        target.tokenizer.decode(out.tokens, skip_special_tokens=True)
        for prompt in PROMPTS
        for out in generate(target, None, target.chat_ids([{"role": "user", "content": prompt}]), TOKENS)
    ]
    assert found["text"] == plain
    assert all(tau >= 1 for tau in found["tau"])
    assert str(ROOT) not in found["code"]  # the code that was registered with it


def ask(uri: str) -> dict:
    """In a process of its own, in which reaching for another machine is an error."""
    keep = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    keep.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-I", "-c", LOADS, uri, json.dumps(PROMPTS), str(TOKENS)],
        env=keep,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
