"""A trained draft as exporters see it: what kind it is, its weights, and the target that it was made for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepspec.drafters.checkpoint import RECORD, Checkpoint, draft_digest, stored_weights
from deepspec.drafters.load import open_draft
from deepspec.drafters.network import Network
from deepspec.drafters.registry import algorithms
from deepspec.errors import DeepSpecError
from deepspec.evaluation.record import Record
from deepspec.export.layout import tokenizer_files
from deepspec.export.reference import network, with_dense_head
from deepspec.target.embedded import EMBEDDED, PREFIX
from deepspec.target.ends import Ends
from deepspec.target.identity import target_record
from deepspec.target.weights import dtype_of, stored


@dataclass(frozen=True)
class Draft:
    """A draft directory and what is known of it.

    Args:
        name: under `drafters` of params.yaml.
        kind: an algorithm's type.
        checkpoint: the directory as its algorithm loads it.
        record: its deepspec.json; empty for a published draft.
        evaluation: its evaluation record, if there is one.
        dense_head: whether a head of low rank is seen multiplied out, as engines read one.
    """

    name: str
    directory: Path
    kind: str
    checkpoint: Checkpoint
    record: dict[str, Any]
    digest: str
    target: Ends
    evaluation: Record | None = None
    dense_head: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """Return its configuration, in the keys of the drafts that are written here."""
        return self.checkpoint.config

    @cached_property
    def network(self) -> Network:
        """Load the network as it was trained, in float32."""
        found = network(self.kind, self.checkpoint, self.target, self.dtype)
        return with_dense_head(found, self.dtype) if self.dense_head else found

    @cached_property
    def dtype(self) -> torch.dtype:
        """Return the dtype of its weights: bfloat16 for what is trained here."""
        return dtype_of(stored(self.directory).values())

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Return all weights, embeddings and head too, by the names of the draft's own format; floats in `dtype`."""
        named, own = stored_weights(self.network, written_out=True), self.network.stored(written_out=True)
        return named | {name: weight.detach().to(self.dtype) for name, weight in own.items()}

    @property
    def trained(self) -> bool:
        """Return whether it has a network."""
        return algorithms()[self.kind].read is not None

    @property
    def block_size(self) -> int:
        """Return γ, the most tokens it drafts."""
        return self.network.config.block_size if self.trained else self.config["block_size"]

    @property
    def reduced(self) -> bool:
        """Return whether it knows only a part of the target's vocabulary."""
        config = self.network.config
        return config.draft_vocab_size < config.vocab_size

    @property
    def own_embeddings(self) -> bool:
        """Return whether it was published with embeddings that are not the target's."""
        shared = self.target.embeddings.cpu().to(self.dtype).float()
        return not torch.equal(self.network.embed_tokens.weight, shared)

    @property
    def target_path(self) -> str:
        """Return what a command line calls the target: its hub id, or its directory."""
        source = target_record(Path(self.target.source)).get("source", "")
        is_id = (
            source.count("/") == 1 and not source.startswith((".", "/", PREFIX)) and not Path(source).exists()
        )
        return source if is_id else self.target.source

    @property
    def tokenizer_files(self) -> dict[str, Path]:
        """Return the files of the target's tokenizer and template, which every engine must see unchanged, by name."""
        return tokenizer_files(Path(self.target.source))

    @property
    def licence(self) -> str:
        """Return the target's licence, as far as it is known here."""
        source = target_record(Path(self.target.source)).get("source", "")
        known = EMBEDDED.get(source.removeprefix(PREFIX))
        return known.licence if known else "the target's own (see its model card)"


def load_draft(name: str, directory: Path, target: Ends, evaluation: Path | None = None) -> Draft:
    """
    Load a draft directory with what is known of it.

    Raises:
        DeepSpecError: not a draft directory, another target's draft, or a record of another draft.
    """
    kind, checkpoint = open_draft(directory, target)
    record = directory / RECORD
    digest = draft_digest(directory)
    return Draft(
        name=name,
        directory=directory,
        kind="dflash" if kind == "dspark" and not checkpoint.config.get("markov_rank") else kind,
        checkpoint=checkpoint,
        record=json.loads(record.read_text()) if record.exists() else {},
        digest=digest,
        target=target,
        evaluation=_evaluation(evaluation, digest) if evaluation else None,
    )


def _evaluation(path: Path, digest: str) -> Record | None:
    if not path.exists():
        return None
    record = Record.read(path)
    if record.draft_digest != digest:
        raise DeepSpecError(
            f"{path}: measured with draft {record.draft_digest}, but this one is {digest}; evaluate it first"
        )
    return record
