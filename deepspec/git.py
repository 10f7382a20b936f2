"""git, run as a command."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

from deepspec.errors import DeepSpecError


def git(directory: Path | None, *words: str, env: Mapping[str, str] | None = None) -> str:
    """Return what `git <words>` prints, without white space around it.

    Args:
        directory: to run in; None: the present one.
        env: the whole environment; None: that of this process.

    Raises:
        DeepSpecError: git failed, with its own line, or is not installed.
    """
    try:
        done = subprocess.run(["git", *words], cwd=directory, env=env, capture_output=True, text=True)
    except FileNotFoundError:
        raise DeepSpecError(f"git {words[0]} failed: git is not installed, or {directory} is gone") from None
    if done.returncode:
        raise DeepSpecError(f"git {words[0]} failed: {reason(done) or 'no message'}")
    return done.stdout.strip()


def git_or_none(directory: Path | None, *words: str, env: Mapping[str, str] | None = None) -> str | None:
    """Return what `git` returns, or None where it fails, as outside a repository."""
    try:
        return git(directory, *words, env=env)
    except DeepSpecError:
        return None


def reason(done: subprocess.CompletedProcess[str]) -> str:
    """Return the line by which git or DVC says what went wrong: not the advice that may follow it."""
    told = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    named = [line for line in told if line.lower().startswith(("fatal:", "error:"))]
    return (named or told or [""])[-1]


def git_bytes(directory: Path, name: str) -> bytes | None:
    """Return the bytes of an object such as `HEAD:path`; None if there is no such object."""
    done = subprocess.run(["git", "cat-file", "blob", name], cwd=directory, capture_output=True)
    return done.stdout if done.returncode == 0 else None
