"""What a draft sees of a context that is longer than all that it has learnt from: its end.

A draft's attention spreads over a long context in a way that no short row has taught it, and τ falls
(docs/lab-notes.md). One that learnt rows of at most `SEEN` tokens therefore decodes with a window of so many where its
section names none. Below that length nothing changes, and its files do not say it: engines that know no window see all.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from deepspec.drafters.checkpoint import RECORD, Checkpoint

SEEN = 2048
_EAGLE, _BLOCK = ("eagle3", "peagle"), ("dspark", "dflash", "dflash2")


def for_decoding(kind: str, checkpoint: Checkpoint) -> Checkpoint:
    """Return a draft's directory with the window that it decodes with; as it is where it has one, or learnt more."""
    config = checkpoint.config
    if not 0 < _longest_row(checkpoint) <= SEEN:
        return checkpoint
    if kind in _EAGLE and config.get("sliding_window") is None:
        return replace(checkpoint, config=config | {"sliding_window": SEEN})
    if kind in _BLOCK and not config.get("windows"):
        return replace(checkpoint, config=config | {"windows": [SEEN] * config["num_hidden_layers"]})
    return checkpoint


def _longest_row(checkpoint: Checkpoint) -> int:
    """Return the tokens of the longest row that a draft has learnt from; 0 where nobody says."""
    path = checkpoint.directory / RECORD
    made: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return (made.get("row_tokens") or {}).get("longest") or 0
