"""Where a result comes from: commit, command, versions."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "numpy")

CODE = ("deepspec", "dvc.yaml", "params.yaml")  # what decides a result; reports and dvc.lock change with each


def provenance() -> dict[str, Any]:
    """git_commit (None outside a repository), git_dirty (of `CODE`), command and packages of this process."""
    status = _git("status", "--porcelain", "--untracked-files=no", "--", *CODE)
    return {
        "git_commit": _git("rev-parse", "HEAD") or None,
        "git_dirty": bool(status),
        "command": " ".join([Path(sys.argv[0]).name, *without_folders(sys.argv[1:])]),
        "packages": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
    }


def without_folders(words: list[str]) -> list[str]:
    """Of absolute paths the last part: where somebody keeps their files is nobody's business."""
    return [f".../{Path(word).name}" if word.startswith("/") else word for word in words]


def _git(*words: str) -> str:
    try:
        result = subprocess.run(["git", *words], capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
