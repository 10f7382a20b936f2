"""Where a result comes from: commit, command, versions."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# What the core of the package needs; pyproject.toml has them too.
CORE = ("torch", "transformers", "accelerate", "safetensors", "numpy", "pydantic", "PyYAML", "rich", "typer")
PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "numpy")
CPU_FACTS = ("vendor_id", "cpu family", "model", "stepping")  # a cloud's "model name" hides them
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # which kernels run, so how sums are rounded
# Pathspecs whose uncommitted changes make a result dirty; dvc.yaml and params.yaml are those of the running pipeline.
CODE = (":(top)deepspec", "dvc.yaml", "params.yaml")


def provenance() -> dict[str, Any]:
    """Return git_commit (None outside a repository), git_dirty (of `CODE`), command, packages and CPU."""
    status = _git("status", "--porcelain", "--untracked-files=no", "--", *CODE)
    return {
        "git_commit": _git("rev-parse", "HEAD") or None,
        "git_dirty": bool(status),
        "command": " ".join([Path(sys.argv[0]).name, *without_folders(sys.argv[1:])]),
        "packages": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "cpu": _cpu(),
    }


def without_folders(words: list[str]) -> list[str]:
    """Cut absolute paths to their last part: where somebody keeps their files is nobody's business."""
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


def _cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return `x86_64 AuthenticAMD 25 17 1, avx2 avx512f avx512_bf16`; elsewhere than on Linux the architecture."""
    try:
        lines = cpuinfo.read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.machine()
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    named = [platform.machine(), *(facts[name] for name in CPU_FACTS if name in facts)]
    known = set(facts.get("flags", "").split())
    flags = " ".join(flag for flag in CPU_FLAGS if flag in known)
    return ", ".join(filter(None, (" ".join(named), flags)))
