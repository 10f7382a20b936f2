"""Step 5: two processes share one device and train as one does, data parallel and sharded by FSDP2.

One device is all that is asked for, so the times are no gain: what is shown is that the code runs and the losses agree.
NCCL may refuse two processes on one device; gloo carries the device's tensors through the host.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu import models
from benchmarks.gpu.findings import Findings, Setting
from benchmarks.gpu.worker import BACKEND

ROOT = Path(__file__).parents[2]
AGREED = 1e-3  # of losses in float32, whose sums are in another order
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def run(setting: Setting, findings: Findings) -> None:
    sizes = setting.pick(models.TINY, models.SMALL)
    target = models.make_target(setting.work / "float32", sizes, "float32", setting.device)
    alone = findings.piece("one process", lambda: launch(setting, target, "alone", 1, {}))
    # Each launch takes seconds on a CPU, where `test_distributed.py` has both ways.
    ways = setting.pick({"fsdp2": FSDP2}, {"ddp": {}, "fsdp2": FSDP2})
    for backend in setting.pick(("gloo",), ("gloo", "nccl")):
        for name, environment in ways.items():
            what = f"{name}, {backend}"
            findings.piece(
                f"two processes, {what}",
                lambda e={BACKEND: backend, **environment}, w=what: beside(
                    alone, launch(setting, target, w.replace(", ", "-"), 2, e)
                ),
            )


def launch(
    setting: Setting, target: Path, name: str, processes: int, environment: dict[str, str]
) -> dict[str, Any]:
    """What `worker.py` found.

    Raises:
        RuntimeError: it failed; the message has its last line.
    """
    work = setting.work / "processes" / name
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    size = setting.pick({"steps": 2, "length": 24, "anchors": 3}, {"steps": 40, "length": 512, "anchors": 64})
    result = (work / "result.json").resolve()
    words = [
        "benchmarks.gpu.worker",
        str(target.resolve()),
        str(work.resolve()),
        str(result),
        json.dumps(size),
    ]
    launcher = ["torch.distributed.run", "--nproc-per-node", str(processes), "--standalone", "-m"]
    everything = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    everything |= {"ACCELERATE_USE_CPU": "true"} if setting.dry else {}
    command = [sys.executable, "-m", *(launcher if processes > 1 else []), *words]
    done = subprocess.run(
        command, cwd=ROOT, env=everything, capture_output=True, text=True, timeout=setting.seconds / 3
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "Error" in line] or ["no message"]
        raise RuntimeError(lines[0])
    return json.loads(result.read_text())


def beside(alone: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """The same with how far the losses are from those of one process.

    Raises:
        RuntimeError: too far.
    """
    if "error" in alone:
        raise RuntimeError("nothing to compare with: one process failed")
    pairs = zip(found["losses"], alone["losses"], strict=True)
    away = max(abs(ours - theirs) for ours, theirs in pairs)
    if away > AGREED:
        raise RuntimeError(f"a loss is {away:.2g} away from that of one process")
    return found | {"away": away}
