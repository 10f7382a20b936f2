"""`kill -9` of a reproduction in the middle of a stage: the next goes on and ends as an unbroken run does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pyarrow.parquet
import pytest

from tests.e2e.clone import ROOT, Clone, make_clone
from tests.e2e.warm import warm

pytestmark = pytest.mark.e2e
TRAIN = "train@dspark"


def lines(root: Path, pattern: str) -> int:
    return sum(path.read_bytes().count(b"\n") for path in root.glob(pattern))


def slow_clone(root: Path) -> Clone:
    """Long enough to be caught in the act: one prompt at a time, many steps."""
    clone = make_clone(root, "llama")
    clone.set("pipeline", ["dspark"])
    clone.set("prompts.count", 40)
    clone.set("generate.batch_size", 1)
    clone.set("train.steps", 120)
    clone.set("train.save_every", 10)
    clone.set("train.eval_every", 20)
    return clone


def test_killed_stages_resume_and_end_as_an_unbroken_run(tmp_path: Path):
    unbroken = slow_clone(tmp_path / "unbroken")
    unbroken.repro(TRAIN)
    killed = slow_clone(tmp_path / "killed")
    data, draft = killed.root / "data/distill", killed.root / "data/drafts/dspark"

    killed.kill_repro(TRAIN, when=lambda: lines(killed.root, ".deepspec/generate/*/shard-*.jsonl") >= 5)
    assert not data.exists()
    before = lines(killed.root, ".deepspec/generate/*/shard-*.jsonl")
    assert before < 40

    killed.kill_repro(TRAIN, when=lambda: any(killed.root.glob(".deepspec/train/*/checkpoint.pt")))
    assert not draft.exists()
    rows = [pyarrow.parquet.read_table(c.root / "data/distill/train.parquet") for c in (killed, unbroken)]
    assert rows[0].equals(rows[1])

    assert killed.repro(TRAIN) == [TRAIN]
    for name in ("model.safetensors", "config.json"):
        assert (draft / name).read_bytes() == (unbroken.root / "data/drafts/dspark" / name).read_bytes()
    history = [
        [json.loads(line) for line in (c.root / "reports/train/dspark.jsonl").read_text().splitlines()]
        for c in (killed, unbroken)
    ]
    assert [line["step"] for line in history[0]] == [line["step"] for line in history[1]]
    assert [line["heldout_tau"] for line in history[0]] == [line["heldout_tau"] for line in history[1]]

    # DVC removes a stage's outputs before it runs it again: until the new draft is there, the old one is in the cache.
    old = (draft / "model.safetensors").read_bytes()
    killed.set("train.lr", 5.0e-4)
    started = set(killed.root.glob(".deepspec/train/*"))
    killed.kill_repro(TRAIN, when=lambda: set(killed.root.glob(".deepspec/train/*")) - started)
    assert not draft.exists()
    assert killed.run("dvc", "checkout", "data/drafts/dspark").returncode == 0
    assert (draft / "model.safetensors").read_bytes() == old


TELLS = """
import os, sys
os.write(int(sys.argv[1]), b"held")
print(os.getcwd(), os.environ["WHO"], sys.argv[1:], sys.stdin.read(), sys.executable)
raise SystemExit(7)
"""


def test_a_warm_process_is_the_program_that_asked_for_it(tmp_path: Path):
    """Its words, environment, directory, open files and status; whoever kills the one kills the other."""
    there = tmp_path / "there"
    there.mkdir()
    (there / "tells.py").write_text(TELLS)
    with warm(tmp_path / "bin", {**os.environ, "PYTHONPATH": str(ROOT)}, ("json",)) as programs:
        python, (read, write) = str(programs / "python"), os.pipe()
        done = subprocess.run(
            [python, "-m", "tells", str(write), "a b"], cwd=there, env={"WHO": "me", "PATH": os.environ["PATH"]},
            input="asked", capture_output=True, text=True, pass_fds=[write],
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (7, "")
        assert done.stdout.strip() == f"{there} me {[str(write), 'a b']} asked {python}"
        assert os.read(read, 9) == b"held"

        for number in (signal.SIGKILL, signal.SIGTERM):
            words = [python, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)"]
            asleep = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
            pid = int(asleep.stdout.readline())
            asleep.send_signal(number)
            assert asleep.wait() == -number
            assert asleep.stdout.read() == ""  # whose other end the process held
            while Path(f"/proc/{pid}").exists():  # the test's own time limit ends this
                time.sleep(0.01)
