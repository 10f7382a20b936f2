"""Our kernels for CPUs, `target/native/kernels.cpp`: compiled by the machine's own compiler into the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch  # its OpenMP is the one that the library then shares

from deepspec.errors import DeepSpecError

logger = logging.getLogger(__name__)

SWITCH = "DEEPSPEC_NATIVE"  # 0 leaves the kernels out
CACHED = ".cache", "deepspec", "native"  # in the home directory
SOURCE = Path(__file__).parent / "target" / "native" / "kernels.cpp"
COMPILERS = ("g++", "c++", "clang++")
NEEDED = ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl", "avx512_bf16")
FLAGS = (
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-shared",
    "-fopenmp",
    "-ffp-contract=off",  # else the same sum would be rounded in two ways in two tiles
    "-mfma",
    "-mavx512f",
    "-mavx512bw",
    "-mavx512dq",
    "-mavx512vl",
    "-mavx512bf16",
)
LONGEST_S = 300


def kernels() -> ctypes.CDLL | None:
    """Return the library, compiled at its first use; None where this machine cannot have it (see `state`)."""
    return _found()[0]


def state() -> str:
    """Return whether the kernels are used, or why not."""
    library, reason = _found()
    return "in use" if library else f"not used: {reason}"


@cache
def _found() -> tuple[ctypes.CDLL | None, str]:
    if reason := _unsuited():
        return None, reason
    try:
        return ctypes.CDLL(str(_compiled())), ""
    except (DeepSpecError, OSError, RuntimeError) as error:  # the last where a user has no home directory
        logger.warning("the kernels for this CPU cannot be had, torch's own are used: %s", error)
        return None, str(error)


def _unsuited() -> str | None:
    if os.environ.get(SWITCH) == "0":
        return f"${SWITCH} is 0"
    found = torch.cpu.get_capabilities()
    if missing := [name for name in NEEDED if not found.get(name)]:
        return f"this CPU has no {missing[0]}"
    if found.get("amx_bf16"):
        return "this CPU has AMX, which torch's own kernels use"
    return None


def _compiled() -> Path:
    """Return the library's file, compiled if there is none of this source.

    Raises:
        DeepSpecError: no compiler, or it failed.
    """
    key = hashlib.sha256("\0".join((SOURCE.read_text(), *FLAGS)).encode()).hexdigest()[:16]
    cached = Path.home().joinpath(*CACHED)
    library = cached / f"{key}.so"
    if not library.exists():
        named = os.environ.get("CXX", "").split()  # may have arguments, as in "ccache g++"
        compiler, *more = named or [next(filter(shutil.which, COMPILERS), COMPILERS[0])]
        if shutil.which(compiler) is None:
            raise DeepSpecError(f"no C++ compiler ({compiler if named else ', '.join(COMPILERS)})")
        cached.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cached) as scratch:
            made = Path(scratch) / library.name
            _run([compiler, *more, *FLAGS, "-o", str(made), str(SOURCE)])
            try:
                ctypes.CDLL(str(made))  # what does not load is not kept
            except OSError as error:
                raise DeepSpecError(
                    f"what {compiler} made does not load: {str(error).removeprefix(f'{made}: ')}"
                ) from None
            os.replace(made, library)
    return library


def _run(command: list[str]) -> None:
    try:
        english = os.environ | {"LC_ALL": "C"}  # its errors are looked for below
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_S, env=english)
    except subprocess.TimeoutExpired:
        raise DeepSpecError(f"{command[0]} did not end within {LONGEST_S} s") from None
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or ["no error in its output"]
        raise DeepSpecError(f"{command[0]}: {errors[0]}")
