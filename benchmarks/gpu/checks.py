"""Step 1: the tests marked `gpu`, run without pytest, and the two ceilings that later steps are held against."""

from __future__ import annotations

import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.clock import copy_bandwidth, matrix_rate
from benchmarks.gpu.findings import Findings, Setting
from tests.gpu_checks import CHECKS, GRAPHS, Check
from tests.tiny import make_target


def run(setting: Setting, findings: Findings) -> None:
    findings.piece("ceilings", lambda: ceilings(setting))
    checks = CHECKS if setting.dry else CHECKS | GRAPHS
    with tempfile.TemporaryDirectory() as scratch:
        target = make_target(Path(scratch) / "target")
        for number, (name, check) in enumerate(checks.items()):
            folder = Path(scratch) / str(number)
            findings.piece(
                f"test: {name}", lambda c=check, f=folder: passed(c, target, f, setting.device.type)
            )


def ceilings(setting: Setting) -> dict[str, Any]:
    """Bandwidth of a copy, and the rates of matrix products."""
    device, size = setting.device, setting.pick(256, 8192)
    return {
        "bytes_per_second": copy_bandwidth(device, setting.pick(4, 4096)),
        "bfloat16_flops": matrix_rate(device, size, torch.bfloat16),
        "float32_flops": matrix_rate(device, size, torch.float32),
    }


def passed(check: Check, target: Path, folder: Path, device: str) -> dict[str, Any]:
    """Run one check.

    Raises:
        AssertionError: it does not hold; the message has the line that says so.
    """
    folder.mkdir()
    try:
        check(target, folder, device)
    except AssertionError as error:
        line = traceback.extract_tb(error.__traceback__)[-1].line
        raise AssertionError(f"{line} {error}".strip()) from error
    return {"passed": 1}
