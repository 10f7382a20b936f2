"""Load a draft directory of any known format for decoding."""

from __future__ import annotations

from pathlib import Path

from deepspec.decoding.drafter import Drafter
from deepspec.drafters.checkpoint import Checkpoint, draft_digest, read_config
from deepspec.drafters.published.plan import Plan
from deepspec.drafters.published.recognise import opened, recognise
from deepspec.drafters.registry import algorithms, reader
from deepspec.drafters.window import for_decoding
from deepspec.target.ends import Ends
from deepspec.target.model import Target

_WRITTEN_BY_OTHERS = ("dspark", "dflash", "eagle3", "medusa", "lm")


def load_drafter(path: str | Path, target: Target) -> Drafter:
    """Load any draft directory for decoding; `drafters.deployment` says how it is used.

    Args:
        path: a draft directory, ours or a published one; or the target's own, for its next-token module (MTP).

    Raises:
        DeepSpecError: not a draft directory, a draft that is not run here, corrupt weights, or another target's draft.
    """
    directory = Path(path)
    kind, checkpoint = open_draft(directory, target)
    drafter = algorithms()[kind].load(for_decoding(kind, checkpoint), target)
    drafter.digest = target.digest if is_targets_own(directory, target) else draft_digest(directory)
    return drafter


def examine(directory: Path, target_layers: int | None = None) -> Plan:
    """
    Return what a draft directory is: of an algorithm that only DeepSpec has, or of a published style.

    Args:
        target_layers: of the target that it is to draft for, where it is known.

    Raises:
        DeepSpecError: not a draft directory, or weights that cannot be read.
    """
    config = read_config(directory)
    algorithm = reader(config)
    if algorithm is not None and algorithm.type not in _WRITTEN_BY_OTHERS:
        return Plan("DeepSpec", algorithm.type, algorithm.type, config)
    return recognise(directory, target_layers)


def open_draft(directory: Path, target: Ends) -> tuple[str, Checkpoint]:
    """
    Return the algorithm that loads a draft directory, and the directory as that algorithm reads it.

    Raises:
        DeepSpecError: not a draft directory, one that is not run here, or another target's draft.
    """
    if is_targets_own(directory, target):
        return "mtp", Checkpoint(directory, {"architectures": list(algorithms()["mtp"].architectures)})
    plan = examine(directory, target.num_layers)
    kind = plan.kind or ""
    standalone = kind in algorithms() and algorithms()[kind].standalone
    return kind, opened(directory, plan, target, standalone)


def is_targets_own(directory: Path, target: Ends) -> bool:
    """Return whether a directory is the target's: as a draft it stands for the next-token module that it has."""
    return Path(target.source).is_dir() and directory.resolve() == Path(target.source).resolve()


def is_trained(directory: Path) -> bool:
    """
    Return whether a draft directory holds a network, not a lookup.

    Raises:
        DeepSpecError: not a draft directory.
    """
    algorithm = reader(read_config(directory))
    return algorithm is None or algorithm.network is not None
