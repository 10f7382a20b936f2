"""DVC's command line in this process: a start of `dvc` takes seconds. What its stages start are processes as ever."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from contextlib import chdir
from pathlib import Path
from unittest import mock

from dvc.cli import main
from dvc.logger import ColorFormatter, LoggerHandler


def dvc(root: Path, *words: str) -> subprocess.CompletedProcess:
    """`dvc WORD ...` in a directory; what it logs as a warning or an error is its stderr."""
    said = io.StringIO()
    handler = LoggerHandler(said)
    handler.setLevel(logging.WARNING)
    handler.setFormatter(ColorFormatter(log_colors=False))
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    log = logging.getLogger("dvc")
    log.addHandler(handler)
    try:
        with chdir(root), mock.patch.dict(os.environ, PATH=path):
            status = main(list(words))
    finally:
        log.removeHandler(handler)
    return subprocess.CompletedProcess(words, status, "", said.getvalue())


def make_repository(root: Path) -> None:
    """`git init` and `dvc init` in a directory."""
    subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
    made = dvc(root, "init", "--quiet")
    assert made.returncode == 0, made.stderr
