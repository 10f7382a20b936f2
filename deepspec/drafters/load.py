"""Load a draft directory of any known format for decoding."""

from __future__ import annotations

from pathlib import Path

from deepspec.decoding.drafter import Drafter
from deepspec.drafters.checkpoint import Checkpoint, draft_digest, read_config
from deepspec.drafters.published.recognise import examine, opened
from deepspec.drafters.registry import algorithms, reader
from deepspec.target.model import Target


def load_drafter(path: str | Path, target: Target) -> Drafter:
    """Load any draft directory for decoding; `drafters.deployment` says how it is used.

    Args:
        path: a draft directory, ours or a published one.

    Raises:
        DeepSpecError: not a draft directory, a draft that is not run here, corrupt weights, or another target's draft.
    """
    directory = Path(path)
    kind, checkpoint = open_draft(directory, target)
    drafter = algorithms()[kind].load(checkpoint, target)
    drafter.digest = draft_digest(directory)
    return drafter


def open_draft(directory: Path, target: Target) -> tuple[str, Checkpoint]:
    """
    Return the algorithm that loads a draft directory, and the directory as that algorithm reads it.

    Raises:
        DeepSpecError: not a draft directory, one that is not run here, or another target's draft.
    """
    plan = examine(directory, target.num_layers)
    kind = plan.kind or ""
    standalone = kind in algorithms() and algorithms()[kind].standalone
    return kind, opened(directory, plan, target, standalone)


def is_trained(directory: Path) -> bool:
    """
    Return whether a draft directory holds a network, not a lookup.

    Raises:
        DeepSpecError: not a draft directory.
    """
    algorithm = reader(read_config(directory))
    return algorithm is None or algorithm.network is not None
