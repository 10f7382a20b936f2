"""`kill -9` of vLLM, of the trainer or of both during online training: the next run ends as an unbroken one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from deepspec.serving import environment
from deepspec.serving.launch import OWN
from tests.e2e.clone import ROOT
from tests.tiny import make_target
from tests.unit.test_ends import write_data

pytestmark = pytest.mark.engine
EVERY, STEPS = 5, 200
SETTINGS = {
    "steps": STEPS,
    "save_every": EVERY,
    "eval_every": STEPS,
    "real_decode": False,
    "features": {"mode": "online"},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a tiny target, data to train on and parameters; and the weights of an unbroken run in it."""
    if environment.find() is None:
        pytest.skip("vLLM is not set up; make serve-check does")
    folder = tmp_path_factory.mktemp("online")
    make_target(folder / "data/target", hidden=256)
    write_data(folder / "data/distill")
    params = yaml.safe_load((ROOT / "params.smoke.yaml").read_text(encoding="utf-8"))
    params["target"] |= {
        "engine": "vllm",
        "vllm": {"concurrency": 1},
    }  # what is computed together is the same
    params["train"] |= SETTINGS
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    assert start(folder, "unbroken").wait() == 0
    return folder


def start(folder: Path, name: str) -> subprocess.Popen:
    """Begin to train; what it says of its progress goes into a file of this name."""
    variables = os.environ | {"PYTHONPATH": str(ROOT), "DEEPSPEC_PROGRESS": str(folder / f"{name}.progress")}
    words = ["--drafter", "eagle3", "--as", name.partition("-")[0]]
    with (folder / f"{name}.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "deepspec.stages.train", *words],
            cwd=folder,
            env=variables,
            stdout=log,
            stderr=log,
        )


def steps(folder: Path, name: str) -> list[int]:
    """Return the steps that were reported, in order."""
    lines = map(json.loads, (folder / f"{name}.progress").read_text().splitlines())
    return [line["done"] for line in lines if line.get("label") == "train"]


def engine(folder: Path) -> list[psutil.Process]:
    """Return the processes of the server that was started there."""
    own = str(folder / ".deepspec/serve/states.log")
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(OWN) == own and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@pytest.mark.parametrize("victim", ["vllm", "trainer", "both"])
def test_the_next_run_goes_on_to_the_weights_of_an_unbroken_one(home, victim):
    shutil.rmtree(home / ".deepspec/train")  # of the run before, which ended
    trainer = start(home, victim)
    while not (saved := list(home.glob(".deepspec/train/*/checkpoint.pt"))):
        assert trainer.poll() is None, (home / f"{victim}.log").read_text()
        time.sleep(0.05)
    served = engine(home)
    assert served
    for process in served if victim != "trainer" else []:
        process.kill()
    if victim != "vllm":
        trainer.kill()
    assert trainer.wait() == (2 if victim == "vllm" else -signal.SIGKILL)
    if victim == "vllm":
        assert "error: vLLM ended while it served" in (home / f"{victim}.log").read_text()
    _, alive = psutil.wait_procs(served, timeout=60)
    assert not alive and saved[0].exists() and not (home / "data/drafts" / victim).exists()

    assert start(home, f"{victim}-again").wait() == 0
    first = steps(home, f"{victim}-again")[0]
    assert 0 < first < STEPS and first % EVERY == 0
    drafts = [home / "data/drafts" / name / "model.safetensors" for name in (victim, "unbroken")]
    assert drafts[0].read_bytes() == drafts[1].read_bytes()
