"""Where a result comes from: commit, command, versions."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from deepspec.git import git_or_none

# What the core of the package needs; pyproject.toml has them too.
CORE = ("torch", "transformers", "accelerate", "safetensors", "numpy", "pydantic", "PyYAML", "rich", "typer")
PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "numpy")
CPUINFO = Path("/proc/cpuinfo")
CPU_FACTS = ("vendor_id", "cpu family", "model", "stepping")  # a cloud's "model name" hides them
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # which kernels run, so how sums are rounded
# Pathspecs whose uncommitted changes make a result dirty; dvc.yaml and params.yaml are those of the running pipeline.
CODE = (":(top)deepspec", "dvc.yaml", "params.yaml")


def provenance() -> dict[str, Any]:
    """Return git_commit (None outside a repository), git_dirty (of `CODE`), command, packages and CPU."""
    status = git_or_none(None, "status", "--porcelain", "--untracked-files=no", "--", *CODE)
    return {
        "git_commit": git_or_none(None, "rev-parse", "HEAD"),
        "git_dirty": bool(status),
        "command": " ".join([Path(sys.argv[0]).name, *without_folders(sys.argv[1:])]),
        "packages": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "cpu": describe_cpu(),
    }


def without_folders(words: list[str]) -> list[str]:
    """Cut absolute paths to their last part: where somebody keeps their files is nobody's business."""
    return [f".../{Path(word).name}" if word.startswith("/") else word for word in words]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def describe_cpu(cpuinfo: Path = CPUINFO) -> str:
    """Return `x86_64 AuthenticAMD 25 17 1, avx2 avx512f avx512_bf16`; elsewhere than on Linux the architecture."""
    facts = cpu_facts(cpuinfo)
    named = [platform.machine(), *(facts[name] for name in CPU_FACTS if name in facts)]
    known = set(facts.get("flags", "").split())
    flags = " ".join(flag for flag in CPU_FLAGS if flag in known)
    return ", ".join(filter(None, (" ".join(named), flags)))


def cpu_facts(cpuinfo: Path = CPUINFO) -> dict[str, str]:
    """Return what Linux says of the first core, by name; nothing elsewhere."""
    try:
        lines = cpuinfo.read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
