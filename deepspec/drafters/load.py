"""Load a draft directory of any known format for decoding."""

from __future__ import annotations

from pathlib import Path

from deepspec.decoding.drafter import Drafter
from deepspec.drafters.checkpoint import check_target, draft_digest, read_config
from deepspec.drafters.deployment import DecodeParams
from deepspec.drafters.lookup_first import LookupFirst
from deepspec.drafters.registry import algorithms, reader
from deepspec.errors import DeepSpecError
from deepspec.target.model import Target


def load_drafter(path: str | Path, target: Target, decode: DecodeParams | None = None) -> Drafter:
    """Load any draft directory for decoding.

    Args:
        path: a draft directory, ours or a published one.
        decode: `DecodeParams`; its `lookup` is asked before a trained draft.

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
    if decode is None or decode.lookup is None or algorithm.network is None:
        return drafter
    lookup = algorithms()[decode.lookup.type]
    return LookupFirst(lookup.make(decode.lookup), drafter)
