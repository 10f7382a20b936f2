"""Which sequences and which anchors each step sees: a function of (seed, step) alone, so a resumed run repeats it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from deepspec.errors import DeepSpecError
from deepspec.features.local import Features
from deepspec.features.sequences import Ints

PASS_TOKENS = 1 << 16  # of one pass, padding included
PADDING = 1 << 13  # tokens that may always be padded: less than another pass costs


@dataclass(frozen=True)
class Batch:
    """Blocks to train on.

    features [b, n, layers·d], tokens [b, n], the target's hidden [b, n, d] and log_norm [b, n], anchors [b, blocks];
    and for the γ predictions of each block places (the token whose pass predicts it), labels (target ids) and valid,
    all [b, blocks, γ].
    """

    features: Tensor
    tokens: Tensor
    hidden: Tensor
    log_norm: Tensor
    anchors: Tensor
    places: Tensor
    labels: Tensor
    valid: Tensor

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device; from pinned memory the copy is not waited for."""
        moved = {
            field.name: getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)
        }
        return Batch(**moved)

    def pinned(self) -> Batch:
        """Return the batch in page-locked memory, from which a CUDA device copies while the host goes on."""
        return Batch(**{field.name: getattr(self, field.name).pin_memory() for field in fields(self)})


class Batches:
    """Batches of sequences with their features.

    Args:
        members: indices of the sequences that may be drawn; others can still be had from `blocks`.
        size: sequences a step, over all processes.
        anchors: blocks a sequence.
        gamma: block size.
        pass_tokens: tokens of one pass, padding included; a longer batch is made in more parts.
    """

    def __init__(
        self,
        store: Features,
        members: Ints | list[int],
        size: int,
        anchors: int,
        gamma: int,
        seed: int,
        pass_tokens: int = PASS_TOKENS,
    ):
        self.pass_tokens = pass_tokens
        self.store, self.size, self.anchors, self.gamma, self.seed = store, size, anchors, gamma, seed
        given = np.asarray(members, np.int64)
        self.members: Ints = given[store.sequences.teaches[given]]
        self.steps_per_epoch = max(len(self.members) // size, 1)
        self._epoch: tuple[int, Ints] = (-1, np.zeros((0, size), np.int64))  # and its batches
        self.replayed: dict[int, list[int]] = {}  # anchors to take instead (`training.replay`)

    def indices(self, step: int) -> list[int]:
        """Return the sequences of a step: an epoch visits each once, in batches of like length, in a seeded order."""
        epoch, place = divmod(step, self.steps_per_epoch)
        kept = self._epoch  # other threads may be in another epoch
        if kept[0] != epoch:
            kept = self._epoch = (epoch, self._order(epoch))
        return kept[1][place].tolist()

    def make(self, step: int, rank: int = 0, world: int = 1, parts: int = 1) -> list[Batch]:
        """Return the blocks that process `rank` of `world` trains on in a step.

        They come in `parts` parts, or in more where a pass would have too many tokens or too much padding (`passes`).
        """
        rows = self.indices(step)
        size = -(-len(rows[rank::world]) // parts) * world
        whole = [rows[start : start + size] for start in range(0, len(rows), size)]
        return [self.blocks(mine, step) for each in whole for mine in self.shares(each, rank, world) if mine]

    def shares(self, rows: list[int], rank: int = 0, world: int = 1) -> Iterator[list[int]]:
        """Yield the rows of each pass that process `rank` of `world` takes; all processes make as many passes."""
        lengths = [int(self.store.sequences.lengths[i]) for i in rows]
        places = [max(lengths[start : start + world]) for start in range(0, len(rows), world)]
        mine = rows[rank::world]
        for part in passes(places, self.pass_tokens):
            yield [mine[place] for place in part if place < len(mine)]

    def blocks(self, indices: list[int], step: int, answers_only: bool = False) -> Batch:
        """Draw random blocks of given sequences; a sequence's anchors depend on (seed, step, sequence) alone."""
        anchors = torch.empty(len(indices), self.anchors, dtype=torch.int64)
        for row, i in enumerate(indices):
            replayed = None if answers_only else self.replayed.get(i)
            starts = torch.tensor(replayed) if replayed else torch.from_numpy(self._starts(i, answers_only))
            rng = torch.Generator().manual_seed((self.seed * 1_000_003 + step) * 1_000_003 + i)
            order = torch.randperm(len(starts), generator=rng)  # none twice before each was taken
            chosen = starts[order.repeat(-(-self.anchors // len(starts)))[: self.anchors]]
            anchors[row] = chosen.sort().values  # neighbours share the target's laws
        return self.at(indices, anchors, answers_only)

    def starts(self, i: int, answers_only: bool = False) -> list[int]:
        """Return where a block of sequence i may start: its next token is to be learnt."""
        return self._starts(i, answers_only).tolist()

    def _starts(self, i: int, answers_only: bool) -> Ints:
        return np.flatnonzero(self._mask(i, answers_only)[2:]) + 1

    def at(self, indices: list[int], anchors: Tensor, answers_only: bool = False) -> Batch:
        """Return blocks of given sequences at given anchors [sequences, blocks].

        Prediction k of a block is of the token at anchor + k, from the target's pass over the one before.
        """
        features, hidden, log_norm = self.store.batch(indices)
        n = features.shape[1]
        tokens = torch.zeros(len(indices), n, dtype=torch.int64)
        learnt = torch.zeros(len(indices), n + self.gamma, dtype=torch.bool)
        for row, i in enumerate(indices):
            ids, mask = self.store.sequences.ids(i), self._mask(i, answers_only)
            tokens[row, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
            learnt[row, : len(mask)] = torch.from_numpy(mask.astype(bool))
        rows = torch.arange(len(indices))[:, None, None]
        sources = anchors[..., None] + torch.arange(self.gamma)  # [b, blocks, γ]
        valid = learnt[rows, sources + 1].cumprod(-1).bool()  # only while contiguous learnt tokens last
        sources = sources.clamp(max=n - 1)
        labels = tokens[rows, (sources + 1).clamp(max=n - 1)]
        return Batch(features, tokens, hidden, log_norm, anchors, sources, labels, valid)

    def _mask(self, i: int, answers_only: bool) -> npt.NDArray[np.uint8]:
        sequences = self.store.sequences
        return sequences.answer(i) if answers_only else sequences.learnt(i)

    def check_alive(self) -> None:
        """Refuse data that cannot teach: the loss would fall, and the draft be useless.

        Raises:
            DeepSpecError: features or post-norm states that are the same for every token.
        """
        features, hidden, _ = self.store.batch(self.indices(0))
        n = int(self.store.sequences.lengths[self.indices(0)].min())
        for name, x in (("features", features), ("post-norm states", hidden)):
            if x.shape[-1] and float(x[:, :n].float().flatten(0, 1).std(0).max()) == 0:
                raise DeepSpecError(
                    f"the target's {name} are the same for every token: there is nothing to learn"
                )

    def _order(self, epoch: int) -> Ints:
        """Return the batches of an epoch, [batches, size]."""
        rng = torch.Generator().manual_seed(self.seed * 100003 + epoch)
        shuffled = self.members[torch.randperm(len(self.members), generator=rng).numpy()]
        # Sorting by length within windows of 16 batches keeps padding low and batches varied.
        window = np.arange(len(shuffled)) // (self.size * 16)
        ordered = shuffled[np.lexsort((self.store.sequences.lengths[shuffled], window))]
        size = min(self.size, len(ordered))
        whole = ordered[: len(ordered) // size * size].reshape(-1, size) if size else ordered.reshape(0, 0)
        return whole[torch.randperm(len(whole), generator=rng).numpy()]


def passes(lengths: Sequence[int], most: int = PASS_TOKENS) -> Iterator[list[int]]:
    """Divide rows into passes: yield the places of each.

    A pass has at most `most` tokens, padding included, if it is not one row alone; and no more padding than half
    its tokens, if that is more than `PADDING`: a row of 32,768 tokens does not stretch seven of 300.
    """
    part: list[int] = []
    for place, length in enumerate(lengths):
        longest = max([length, *(lengths[i] for i in part)])
        tokens = length + sum(lengths[i] for i in part)
        size = longest * (len(part) + 1)
        if part and (size > most or size - tokens > max(tokens // 2, PADDING)):
            yield part
            part = []
        part.append(place)
    if part:
        yield part
