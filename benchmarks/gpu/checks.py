"""Step 1: the tests marked `gpu`, and the two ceilings that later steps are held against."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.clock import copy_bandwidth, matrix_rate
from benchmarks.gpu.findings import Findings, Setting

ROOT = Path(__file__).parents[2]
TESTS = "tests/unit/test_gpu.py"


def run(setting: Setting, findings: Findings) -> None:
    findings.piece("ceilings", lambda: ceilings(setting))
    findings.piece("tests", lambda: gpu_tests(setting))


def ceilings(setting: Setting) -> dict[str, Any]:
    """Bandwidth of a copy, and the rates of matrix products."""
    device, size = setting.device, setting.pick(256, 8192)
    return {
        "bytes_per_second": copy_bandwidth(device, setting.pick(4, 4096)),
        "bfloat16_flops": matrix_rate(device, size, torch.bfloat16),
        "float32_flops": matrix_rate(device, size, torch.float32),
    }


def gpu_tests(setting: Setting) -> dict[str, Any]:
    """How the tests came out: {"passed": 9} and the like. They run on what is there: a CPU skips them.

    Raises:
        RuntimeError: pytest is missing, or one failed; the message has the last lines.
    """
    if importlib.util.find_spec("pytest") is None:
        raise RuntimeError("pytest is not installed: the tests were not run")
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", "-rf"]
    # Without the project's options, which name plugins that a bare machine may lack.
    command += ["-c", os.devnull, "--rootdir", str(ROOT), "-W", "ignore", TESTS]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=setting.seconds
    )
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["no output"]
    if done.returncode:
        raise RuntimeError(" / ".join(line for line in lines[-8:] if line))
    return {word: int(count) for count, word in re.findall(r"(\d+) (passed|skipped|failed)", lines[-1])}
