"""DVC's command line in this process: a start of `dvc` takes seconds. What its stages start are processes as ever."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from contextlib import chdir, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from dvc.cli import main
from dvc.logger import ColorFormatter, LoggerHandler

from deepspec.reproduce.checkout import Work


def dvc(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`dvc WORD ...` in a directory; what it logs as a warning or an error is its stderr."""
    printed, said = io.StringIO(), io.StringIO()
    warnings, notes = LoggerHandler(said), LoggerHandler(printed)
    warnings.setLevel(logging.WARNING)
    notes.addFilter(lambda record: record.levelno == logging.INFO)
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    environment = {
        "PATH": path,
        "DVC_TEST": "true",
    }  # without that `--json` is printed past the standard output
    log = logging.getLogger("dvc")
    for handler in (warnings, notes):
        handler.setFormatter(ColorFormatter(log_colors=False))
        log.addHandler(handler)
    try:
        with chdir(root), mock.patch.dict(os.environ, environment), redirect_stdout(printed):
            status = main(list(words))
    finally:
        for handler in (warnings, notes):
            log.removeHandler(handler)
    return subprocess.CompletedProcess(words, status, printed.getvalue(), said.getvalue())


def keep_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `deepspec reproduce` and the clones of flows ask DVC in this process."""

    def stage(work: Work, address: str) -> subprocess.CompletedProcess[str]:
        return dvc(work.root, "repro", "--force", "--single-item", address)

    def ask(work: Work, *words: str, **_: Any) -> subprocess.CompletedProcess[str]:
        return dvc(work.root, *words)

    monkeypatch.setattr(Work, "dvc", ask)
    monkeypatch.setattr(Work, "stage", stage)
    monkeypatch.setattr("flows.workspace.ask_dvc", dvc)


def make_repository(root: Path) -> None:
    """`git init` and `dvc init` in a directory."""
    subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
    made = dvc(root, "init", "--quiet")
    assert made.returncode == 0, made.stderr
