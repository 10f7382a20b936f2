"""Small git repositories with DVC pipelines in them, for tests of what is brought back from one."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.dvc_here import dvc

WHO = ("-c", "user.name=tests", "-c", "user.email=tests@example.org")


def sh(root: Path, *words: str) -> str:
    return subprocess.run(words, cwd=root, check=True, capture_output=True, text=True).stdout


def commit(root: Path, message: str) -> str:
    """Commit everything; return the commit."""
    sh(root, "git", "add", "-A")
    sh(root, "git", *WHO, "commit", "--quiet", "--allow-empty", "-m", message)
    return sh(root, "git", "rev-parse", "HEAD").strip()


def succeed(root: Path, *words: str) -> None:
    """`dvc WORD ...`, which must succeed."""
    done = dvc(root, *words)
    assert done.returncode == 0, done.stderr
