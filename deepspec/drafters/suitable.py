"""Which drafters of params.yaml a target can have, said before anything is computed."""

from __future__ import annotations

from typing import Any

import torch

from deepspec.drafters.network import Network
from deepspec.drafters.registry import algorithms
from deepspec.errors import DeepSpecError
from deepspec.target.ends import Ends


def intended(target: Ends, drafters: dict[str, Any]) -> tuple[dict[str, Network | str], dict[str, str]]:
    """Return the networks to be trained, by name, and of each drafter that this target cannot have why, in one line.

    A drafter that is not trained has its type in the place of a network.

    Args:
        drafters: sections of params.yaml by name.
    """
    networks: dict[str, Network | str] = {}
    refused = {}
    for name, section in drafters.items():
        algorithm = algorithms()[section.type]
        if algorithm.network is None:
            networks[name] = section.type
            continue
        try:
            with torch.device(
                "cpu" if algorithm.standalone else "meta"
            ):  # sizes alone; another model is read
                networks[name] = algorithm.network(section, target)
        except DeepSpecError as error:
            refused[name] = str(error)
        except Exception as error:
            refused[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return networks, refused
