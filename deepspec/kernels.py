"""Our kernels for CPUs, `target/native`: compiled by the machine's own compiler into the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch  # its OpenMP is the one that the library then shares

from deepspec.errors import DeepSpecError

logger = logging.getLogger(__name__)

SWITCH = "DEEPSPEC_NATIVE"  # 0 leaves the kernels out, avx512 their use of AMX
WITHOUT_TILES = "avx512"
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
TILES = ("amx_tile", "amx_bf16")
TILE_FLAGS = ("-mamx-tile", "-mamx-bf16")
WITH_TILES = ", with AMX"
LONGEST_S = 300


def sources() -> bytes:
    """Return all that the library is compiled of."""
    return b"".join(path.read_bytes() for path in (*sorted(SOURCE.parent.glob("*.h")), SOURCE))


def kernels() -> ctypes.CDLL | None:
    """Return the library, compiled at its first use; None where this machine cannot have it (see `state`)."""
    return _found()[0]


def function(name: str) -> Any:
    """Return one of the library's functions; the kernels are there."""
    return getattr(kernels(), f"deepspec_{name}")


def state() -> str:
    """Return whether the kernels are used, and AMX by them, or why not."""
    library, more = _found()
    return f"in use{more}" if library else f"not used: {more}"


def with_tiles() -> bool:
    """Return whether the kernels multiply in AMX's tiles."""
    return _found()[1] == WITH_TILES


@cache
def _found() -> tuple[ctypes.CDLL | None, str]:
    """Return the library and what is to be said of it, or None and why."""
    if reason := _unsuited():
        return None, reason
    try:
        return _loaded()
    except (DeepSpecError, OSError, RuntimeError) as error:  # the last where a user has no home directory
        logger.warning("the kernels for this CPU cannot be had, torch's own are used: %s", error)
        return None, str(error)


def _unsuited() -> str | None:
    if os.environ.get(SWITCH) == "0":
        return f"${SWITCH} is 0"
    found = torch.cpu.get_capabilities()
    if missing := [name for name in NEEDED if not found.get(name)]:
        return f"this CPU has no {missing[0]}"
    return None


def _loaded() -> tuple[ctypes.CDLL, str]:
    refused = ""
    if os.environ.get(SWITCH) != WITHOUT_TILES and all(map(torch.cpu.get_capabilities().get, TILES)):
        try:
            library = ctypes.CDLL(str(_compiled((*FLAGS, *TILE_FLAGS))))
            if library.deepspec_tiles():
                return library, WITH_TILES
            refused = "the system does not grant its tiles"
        except (DeepSpecError, OSError) as error:  # a compiler that does not know them
            refused = str(error)
    library = ctypes.CDLL(str(_compiled(FLAGS)))
    if refused:
        logger.warning("the kernels for this CPU do without AMX: %s", refused)
    return library, ""


def _compiled(flags: Sequence[str]) -> Path:
    """Return the library's file, compiled if there is none of these sources and flags.

    Raises:
        DeepSpecError: no compiler, or it failed.
    """
    key = hashlib.sha256(sources() + "\0".join(flags).encode()).hexdigest()[:16]
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
            _run([compiler, *more, *flags, "-o", str(made), str(SOURCE)])
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
