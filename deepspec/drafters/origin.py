"""`start: <directory>`: a draft that training goes on from, whoever trained it.

Its sizes, layers of the target and rotary embedding stay. What the section asks for may change where the weights allow
it: the length of a block, heads that the draft does not have, and the draft vocabulary, whose columns are cut or
extended. Columns that both have keep their weights; a new one begins as the target's row of the head, with nothing of
the sequential head.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from deepspec.drafters.checkpoint import (
    RECORD,
    Checkpoint,
    draft_digest,
    draft_directory,
    without_ones,
)
from deepspec.drafters.network import SHARED, Network, NormalisedLinear
from deepspec.drafters.padding import BY_COLUMN
from deepspec.drafters.published.recognise import opened, recognise
from deepspec.drafters.published.vocabulary import draft_ids
from deepspec.drafters.start import WAYS
from deepspec.errors import DeepSpecError
from deepspec.target.ends import Ends

# What a draft may gain.
NEW = (
    "markov_head.",
    "confidence_head.",
    "context_skip.",
    "candidate_selector.",
    "attention_conv.",
    "mlp_conv.",
    "fc_norm.",
    "mask_hidden",
    "low_rank_head.",
)


@dataclass(frozen=True)
class Origin:
    """A draft that another begins as."""

    checkpoint: Checkpoint
    vocab_size: int

    @property
    def config(self) -> dict[str, Any]:
        """Return its configuration, in our keys."""
        return self.checkpoint.config

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Return its weights by our names, float32, without the vocabulary's."""
        found = self.checkpoint.weights()
        return {name: w.float() for name, w in found.items() if name not in ("d2t", "t2d")}

    @cached_property
    def ids(self) -> Tensor:
        """Return the target ids of its columns, int64 [columns].

        Raises:
            DeepSpecError: its d2t cannot be read.
        """
        found = self.checkpoint.weights()
        columns = self.config.get("draft_vocab_size") or self.vocab_size
        return draft_ids(found.get("d2t"), found.get("t2d"), columns, self.vocab_size)

    @property
    def record(self) -> dict[str, Any]:
        """Return what a draft that began as this one says of it: where it was, which it was, and how it was made."""
        directory = self.checkpoint.directory
        kept = directory / RECORD
        made = json.loads(kept.read_text()) if kept.exists() else {}
        known = {key: made[key] for key in ("drafter", "data_digest", "git_commit", "parents") if key in made}
        return {"directory": str(directory), "digest": draft_digest(directory), **known}

    @torch.no_grad()
    def give(self, network: Network) -> None:
        """
        Copy its weights into a network that has its draft vocabulary.

        Raises:
            DeepSpecError: a weight that the network has no place for, or of another shape.
        """
        state = network.state_dict()
        names = {network.stored_name(name): name for name in state if name != "draft_ids"}
        where = self.checkpoint.directory
        if strange := sorted(set(self.weights) - set(names)):
            raise DeepSpecError(f"start: {where} has {strange[0]}, which this drafter has no place for")
        lacking = sorted(set(names) - set(self.weights) - SHARED)
        if lacking := [name for name in lacking if not any(part in name for part in NEW)]:
            raise DeepSpecError(f"start: {where} lacks {lacking[0]}")
        for stored, weight in self.weights.items():
            own = state[names[stored]]
            if stored in BY_COLUMN:
                weight = self._columns(weight, own.clone(), network.draft_ids.cpu())
            weight = without_ones(weight, own.shape)
            if weight.shape != own.shape:
                raise DeepSpecError(
                    f"start: {stored} of {where} is {list(weight.shape)}, and this drafter's {list(own.shape)}"
                )
            if stored == "lm_head.weight":
                network.take_head(weight)
            elif stored == "embed_tokens.weight":
                network.take_embeddings(weight)
            else:
                own.copy_(weight)

    def _columns(self, weight: Tensor, own: Tensor, ids: Tensor) -> Tensor:
        """Return the rows [columns, ·] for the tokens `ids`: the origin's where it has one, else the network's own."""
        row = torch.full((self.vocab_size,), -1)
        row[self.ids] = torch.arange(len(self.ids))
        known = row[ids] >= 0
        own[known] = weight[row[ids][known]].to(own)
        return own


def open_origin(start: str, kinds: tuple[str, ...], target: Ends) -> Origin | None:
    """
    Return the draft that `start` names; None where it says how layers begin.

    Args:
        kinds: of algorithms whose drafts can be gone on from.

    Raises:
        DeepSpecError: no such draft, one that is not run here or was made for another target, or one of another kind.
    """
    if start in WAYS:
        return None
    try:
        directory = draft_directory(start)
    except DeepSpecError as error:
        raise DeepSpecError(f"start: {start!r} is none of {', '.join(WAYS)}, and {error}") from None
    plan = recognise(directory, target.num_layers)
    checkpoint = opened(directory, plan, target)
    if plan.kind not in kinds:
        wanted = " or ".join(kinds)
        raise DeepSpecError(f"start: {directory} is {plan.what}, and a draft of type {wanted} is wanted")
    return Origin(checkpoint, target.vocab_size)


def check_kept(asked: dict[str, object], origin: Origin) -> None:
    """
    Refuse a section that asks for what a draft cannot change.

    Args:
        asked: key of its configuration → what the section says.

    Raises:
        DeepSpecError: something else than the origin has.
    """
    for key, wanted in asked.items():
        found = origin.config.get(key)
        found = list(found) if isinstance(found, tuple) else found
        if found != wanted:
            raise DeepSpecError(
                f"start: {origin.checkpoint.directory} has {key} {found}, which stays; {wanted} was asked for"
            )


def keep_scale(fc: NormalisedLinear, channel_std: Tensor) -> None:
    """Divide its inputs by their deviation from now on, and multiply its weight by it: what it says stays."""
    before = fc.scale.clone()
    fc.set_scale(channel_std)
    with torch.no_grad():
        fc.weight.mul_(fc.scale / before)
