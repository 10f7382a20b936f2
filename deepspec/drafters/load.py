"""Load a draft directory of any known format for decoding."""

from __future__ import annotations

from pathlib import Path

from deepspec.decoding.drafter import Drafter
from deepspec.drafters.checkpoint import check_target, draft_digest, read_config
from deepspec.drafters.registry import reader
from deepspec.errors import DeepSpecError
from deepspec.target.model import Target


def load_drafter(path: str | Path, target: Target) -> Drafter:
    """Load any draft directory for decoding; `drafters.deployment` says how it is used.

    Args:
        path: a draft directory, ours or a published one.

    Raises:
        DeepSpecError: not a draft directory, unknown architecture, corrupt weights, or another target's draft.
    """
    directory = Path(path)
    config = read_config(directory)
    algorithm = reader(config)
    if algorithm is None:
        raise DeepSpecError(f"{directory}: unknown draft architecture {config.get('architectures')}")
    check_target(directory, config, target, algorithm.standalone)
    drafter = algorithm.load(directory, config, target)
    drafter.digest = draft_digest(directory)
    return drafter
