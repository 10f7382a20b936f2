"""What training found on held-out contexts, kept with the draft, so that decoding can be held to it.

Training and decoding run a draft by different code: one reads cached features of whole sequences, the other what the
engine hands it round by round. A wrong layer, a missing norm or a wrong mask token in either makes a draft that looks
good in training and fails when it is served. So the draft's directory keeps held-out contexts with the blocks that the
network in training drafts there, and whether their first token is the target's; decoding from the same contexts must
draft the same, but for rounding. Acceptance alone would show gross mistakes only: features of the layer next to the
right one cost the demo's draft hardly a token, though it drafts other ones.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from deepspec.decoding.drafter import Drafter
from deepspec.decoding.engine import Engine
from deepspec.decoding.request import Request
from deepspec.decoding.round import Round
from deepspec.errors import DeepSpecError
from deepspec.files import write_text
from deepspec.target.model import Target

PROMISE = "promise.json"
_TOLERANCE = 0.02  # of the acceptance rate: near-ties fall either way in another precision
_ALIKE = 0.93  # of all tokens; in bfloat16 0.94 to 0.98 were seen of sound drafts, 0.8 of a wrong layer
_LEAST = 20  # blocks that a share must be over
_DOUBT = 2.33  # standard deviations: one sound draft in a hundred would look worse by chance


@dataclass(frozen=True)
class HeldOutBlocks:
    """A held-out conversation and the greedy blocks drafted in it.

    It holds the places where blocks begin, the block of each, and whether its first token is the target's (1) or
    not (0).
    """

    ids: list[int]
    anchors: list[int]
    chains: list[list[int]]
    accepted: list[int]

    def contexts(self) -> list[list[int]]:
        """Token ids up to and with each anchor."""
        return [self.ids[: anchor + 1] for anchor in self.anchors]


@dataclass(frozen=True)
class Check:
    """Greedy blocks as training has them and as decoding has them, from the same contexts.

    Args:
        promised, measured: acceptance at position 1.
        agreement: by position, share of blocks with the same token, of those that were the same up to there.
        below: acceptance is lower than chance would have it.
        unlike: more tokens differ than rounding and chance would have it.
    """

    promised: float
    measured: float
    agreement: list[float]
    blocks: int
    below: bool
    unlike: bool


def save(directory: str | Path, kept: list[HeldOutBlocks]) -> None:
    """Write `promise.json` into a draft's directory."""
    rows = ",\n".join(json.dumps(row.__dict__) for row in kept)
    write_text(Path(directory) / PROMISE, f"[\n{rows}\n]\n")


def load(directory: str | Path) -> list[HeldOutBlocks]:
    """Of a draft's directory; nothing for one that training here did not make.

    Raises:
        DeepSpecError: a file that is something else.
    """
    path = Path(directory) / PROMISE
    if not path.exists():
        return []
    try:
        return [HeldOutBlocks(**row) for row in json.loads(path.read_text())]
    except (ValueError, TypeError):
        raise DeepSpecError(f"{path}: not a record of held-out contexts") from None


def check(target: Target, drafter: Drafter, kept: list[HeldOutBlocks], batch_size: int = 16) -> Check | None:
    """Decode from the contexts with the draft alone and compare; None where none was kept.

    Args:
        drafter: alone or behind a lookup, which is not asked.
    """
    contexts = [context for row in kept for context in row.contexts()]
    if not contexts:
        return None
    return _compare(kept, _first_rounds(target, drafter.trained, contexts, batch_size))


def _compare(kept: list[HeldOutBlocks], rounds: list[tuple[list[int], int]]) -> Check:
    """Compare with `rounds`: of each context the drafted block, and how many of its tokens were accepted.

    Acceptance is `below` the promise where more than 2 % of the contexts are lost, and more than chance would have it:
    of the contexts that differ, which rounding alone would split evenly, too many are losses (McNemar's test).
    Tokens are `unlike` over all positions together: of seven shares of 90 blocks the lowest is far below what all have.
    """
    before = [bool(accepted) for row in kept for accepted in row.accepted]
    after = [accepted > 0 for _, accepted in rounds]
    lost = sum(b and not a for b, a in zip(before, after, strict=True))
    gained = sum(a and not b for b, a in zip(before, after, strict=True))
    shortfall = (lost - gained) / len(rounds)
    doubt = _DOUBT * math.sqrt(lost + gained) / len(rounds)
    counts = _alike([chain for row in kept for chain in row.chains], [tokens for tokens, _ in rounds])
    alike, of = sum(alike for alike, _ in counts), sum(of for _, of in counts)
    return Check(
        promised=sum(before) / len(before),
        measured=sum(after) / len(after),
        agreement=[alike / of for alike, of in counts],
        blocks=len(rounds),
        below=shortfall > max(_TOLERANCE, doubt),
        unlike=alike < _ALIKE * of - _DOUBT * math.sqrt(_ALIKE * (1 - _ALIKE) * of),
    )


def _first_rounds(
    target: Target, drafter: Drafter, contexts: list[list[int]], batch_size: int
) -> list[tuple[list[int], int]]:
    """Return the block that is drafted after each context, and how many of its tokens are accepted."""
    rounds: list[tuple[list[int], int]] = [([], 0)] * len(contexts)
    every = frozenset(range(target.vocab_size))  # any token ends the request: one round of a whole block

    def verified(done: Round) -> None:
        rounds[done.request_id] = (done.proposal.tokens, done.accepted)

    waiting = iter(
        [Request(ids, drafter.block_size + 1, stop_ids=every, id=i) for i, ids in enumerate(contexts)]
    )
    engine = Engine(target, drafter, batch_size=batch_size, on_round=verified)
    for generation in engine.run(lambda: next(waiting, None)):
        if generation.error:
            raise DeepSpecError(f"held-out context {generation.id}: {generation.error}")
    return rounds


def _alike(promised: list[list[int]], found: list[list[int]]) -> list[tuple[int, int]]:
    """By position: blocks with the same token, of those that were the same up to there."""
    counts = []
    for k in range(max(map(len, promised))):
        alike = [a[k] == b[k] for a, b in zip(promised, found, strict=True) if len(b) > k and a[:k] == b[:k]]
        if len(alike) < _LEAST:
            break
        counts.append((sum(alike), len(alike)))
    return counts
