"""Several processes on this machine (gloo), data parallel and sharded by FSDP2, extract and train as one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

from tests.e2e.stages import ENVIRONMENT, alone, run_module
from tests.tiny import cached_target

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def target():
    return cached_target("llama")


def launch(target: Path, work: Path, processes: int, sharded: bool = False, steps: int = 99) -> int:
    """Train in so many processes, one being this; the exit status."""
    words = ["tests.train_small", str(target), str(work), str(steps)]
    if processes == 1:
        with alone():
            return run_module(*words)
    launcher = ["torch.distributed.run", "--nproc-per-node", str(processes), "--standalone", "-m"]
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    if sharded:
        environment |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    done = subprocess.run(
        [sys.executable, "-m", *launcher, *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert steps < 99 or done.returncode == 0, done.stderr[-3000:]
    return done.returncode


@pytest.fixture(scope="module")
def single(target, tmp_path_factory):
    work = tmp_path_factory.mktemp("alone")
    assert launch(target, work, 1) == 0
    return (*json.loads((work / "result.json").read_text()), (work / "features/manifest.json").read_bytes())


@pytest.mark.parametrize(("processes", "sharded"), [(4, False), (2, True)], ids=["ddp-4", "fsdp2-2"])
def test_several_processes_have_the_shards_and_the_loss_curve_of_one(
    single, target, tmp_path, processes, sharded
):
    launch(target, tmp_path, processes, sharded)
    shares = [json.loads((tmp_path / f"shards-{rank}.json").read_text()) for rank in range(processes)]
    counts = list(map(len, shares))
    assert min(counts) >= max(counts) - 1 >= 1, "a process has more than a shard less to do than another"
    assert sorted(chain(*shares)) == list(range(sum(counts))), "no shard is computed twice"
    history, weights = json.loads((tmp_path / "result.json").read_text())
    manifest = (tmp_path / "features/manifest.json").read_bytes()
    assert len(json.loads(manifest)["shards"]) == sum(counts)
    assert manifest == single[2], "shards have the bytes, by their checksums, of those of one process"
    assert len(history) == len(single[0]) == 4
    for ours, theirs in zip(history, single[0], strict=True):
        for name in ("loss", "ce", "tv", "confidence", "heldout_tau"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-4), name
    for name, weight in weights.items():
        assert weight == pytest.approx(single[1][name], abs=1e-4), name


def test_a_sharded_run_goes_on_in_one_process(single, target, tmp_path):
    assert launch(target, tmp_path, 2, sharded=True, steps=5) != 0
    assert (tmp_path / "checkpoint.pt").exists()
    assert launch(target, tmp_path, 1) == 0
    history, _ = json.loads((tmp_path / "result.json").read_text())
    assert [line["loss"] for line in history] == pytest.approx([line["loss"] for line in single[0]], abs=1e-4)
