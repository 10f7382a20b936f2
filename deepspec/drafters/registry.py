"""Which drafting algorithms there are: each file of this folder that has an `ALGORITHM` registers one."""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module

import deepspec.drafters
from deepspec.drafters.algorithm import Algorithm


@cache
def algorithms() -> dict[str, Algorithm]:
    """Type → algorithm, by name."""
    modules = sorted(info.name for info in pkgutil.iter_modules(deepspec.drafters.__path__))
    found = [getattr(import_module(f"deepspec.drafters.{name}"), "ALGORITHM", None) for name in modules]
    return {algorithm.type: algorithm for algorithm in found if algorithm}


def reader(architecture: str) -> Algorithm | None:
    """The algorithm that loads drafts of this architecture."""
    return next((a for a in algorithms().values() if architecture in a.architectures), None)
