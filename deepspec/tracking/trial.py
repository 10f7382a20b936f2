"""Whether a version of the registry can be used: loaded and asked in a process of its own (`fresh.py`)."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from deepspec.tracking import fresh
from deepspec.tracking.store import Store


def fault(uri: str, store: Store, work: Path) -> str | None:
    """Return why a version cannot be used, in one line; None if it loads and writes its target's own tokens.

    Args:
        uri: of a registered version or a logged model, `models:/...`.
        work: takes a copy of the version's files meanwhile.
    """
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="trial-", dir=work, ignore_cleanup_errors=True) as scratch:
        return ask_in_fresh_process(uri, str(Path(scratch).resolve()), store.uri)


def ask_in_fresh_process(uri: str, folder: str, store: str) -> str | None:
    """Run `fresh.py` for a version into a folder; return why it failed, or None."""
    done = subprocess.run(
        [sys.executable, "-P", str(Path(fresh.__file__).resolve()), uri, folder],
        cwd=folder,
        env=os.environ | {"MLFLOW_TRACKING_URI": store},
        capture_output=True,
        text=True,
    )
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return f"the process that loads it was ended by signal {-done.returncode} (is there memory enough?)"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (told or lines or [f"exit status {done.returncode}"])[-1]
