"""Which drafting algorithms there are: each file of this folder that has an `ALGORITHM` registers one."""

from __future__ import annotations

import pkgutil
from fnmatch import fnmatchcase
from functools import cache
from importlib import import_module
from typing import Any

import deepspec.drafters.algorithms
from deepspec.drafters.algorithm import Algorithm


@cache
def algorithms() -> dict[str, Algorithm]:
    """Type → algorithm, by name."""
    modules = sorted(info.name for info in pkgutil.iter_modules(deepspec.drafters.algorithms.__path__))
    found = [
        getattr(import_module(f"deepspec.drafters.algorithms.{name}"), "ALGORITHM", None) for name in modules
    ]
    return {algorithm.type: algorithm for algorithm in found if algorithm}


def reader(config: dict[str, Any]) -> Algorithm | None:
    """Return the algorithm that loads drafts with this `config.json`."""
    named = config.get("architectures") or (
        ["MedusaModel"] if "medusa_num_heads" in config else []
    )  # TGI's has none
    for algorithm in algorithms().values():
        if named and any(fnmatchcase(named[0], pattern) for pattern in algorithm.architectures):
            return algorithm
    return None
