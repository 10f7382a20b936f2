"""The distillation data as a trainer sees it: token sequences and which of their tokens count."""

from __future__ import annotations

import json
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path

from deepspec.errors import DeepSpecError


@dataclass(frozen=True)
class Sequence:
    """A row's tokens; of each, whether it is part of an answer and whether it is to be learnt.

    `conversation` is the id of the conversation of which the row is one generation; empty: the row is a conversation.
    """

    ids: list[int]
    answer: list[int]
    learnt: list[int]
    conversation: str = ""


def read_sequences(directory: Path, max_length: int, supervise: str) -> tuple[list[Sequence], str]:
    """Read the conversations of a distillation data set, cut to `max_length`, and the data's digest.

    `supervise="answer"` learns the answers alone, `"all"` also the prompts: the target's law is as valid there. What
    all conversations begin with (the template, a system prompt) is never learnt, nor again what an earlier row of the
    same conversation begins with.

    Raises:
        DeepSpecError: no data set there, or no token to learn from.
    """
    import pyarrow.parquet

    path = directory / "train.parquet"
    if not path.exists():
        raise DeepSpecError(f"{path}: no such data set; run the generate stage first")
    several = "prompt" in pyarrow.parquet.read_schema(path).names
    names = ["input_ids", "loss_mask", *(["prompt"] if several else [])]
    columns = pyarrow.parquet.read_table(path, columns=names).to_pydict()
    everything, masks = ([row[:max_length] for row in columns[name]] for name in ("input_ids", "loss_mask"))
    start = len(commonprefix(everything)) if len(everything) > 1 else 0
    sequences: list[Sequence] = []
    for ids, answer, conversation in zip(
        everything, masks, columns.get("prompt") or [None] * len(masks), strict=True
    ):
        known = start
        if conversation and sequences and sequences[-1].conversation == conversation:
            known = max(start, len(commonprefix([sequences[-1].ids, ids])))
        learnt = [0] * known + [1] * (len(ids) - known) if supervise == "all" else answer
        sequences.append(Sequence(ids, answer, learnt, conversation or ""))
    if not any(any(sequence.learnt[2:]) for sequence in sequences):
        raise DeepSpecError(f"{path}: no token to learn from in {len(sequences)} conversations")
    return sequences, json.loads((directory / "manifest.json").read_text())["digest"]
