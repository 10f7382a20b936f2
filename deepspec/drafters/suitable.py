"""Which drafters of params.yaml a target can have, said before anything is computed."""

from __future__ import annotations

from typing import Any

import torch

from deepspec.drafters.registry import algorithms
from deepspec.errors import DeepSpecError
from deepspec.target.model import Target


def refusals(target: Target, drafters: dict[str, Any]) -> dict[str, str]:
    """Return, of each drafter that this target cannot have, the reason in one line.

    Args:
        drafters: sections of params.yaml by name.
    """
    found = {}
    for name, section in drafters.items():
        algorithm = algorithms()[section.type]
        if algorithm.network is None:
            continue
        try:
            with torch.device(
                "cpu" if algorithm.standalone else "meta"
            ):  # sizes alone; another model is read
                algorithm.network(section, target)
        except DeepSpecError as error:
            found[name] = str(error)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return found
