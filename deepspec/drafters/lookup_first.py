"""Lookup first: where the context repeats itself the lookup drafter answers, else the trained one.

A lookup costs microseconds, so a long enough match saves the trained draft's whole pass. The choice depends on the
context alone: the proposal stays lossless under the rule of whichever drafter made it.
"""

from __future__ import annotations

from torch import Tensor

from deepspec.decoding.drafter import Drafter, DraftRequest, Proposal, Session


class LookupFirst(Drafter):
    """Ask `lookup`; what it matches is proposed, anything else is left to `trained`.

    It stands for the trained draft: its layers, vocabulary and digest are that one's.

    Args:
        lookup: a drafter that reads no features and proposes nothing where it knows nothing.
        trained: asked for the rest, in one call for all rows.
    """

    looks_up = True

    def __init__(self, lookup: Drafter, trained: Drafter):
        self.lookup = lookup
        self._trained = trained
        self.layers = trained.layers
        self.block_size = max(lookup.block_size, trained.block_size)
        self.vocab_size = trained.vocab_size
        self.digest = trained.digest

    @property
    def trained(self) -> Drafter:
        """The draft behind the lookup."""
        return self._trained

    def session(self, slots: int) -> LookupFirstSession:
        return LookupFirstSession(self.lookup.session(slots), self.trained.session(slots))


class LookupFirstSession(Session):
    def __init__(self, lookup: Session, trained: Session):
        self.lookup = lookup
        self.trained = trained

    def begin(self, row: int) -> None:
        self.lookup.begin(row)
        self.trained.begin(row)

    def extend(self, row: int, tokens: list[int], features: Tensor | None) -> None:
        self.lookup.extend(row, tokens, None)
        self.trained.extend(row, tokens, features)

    def share(self, source: int, row: int, tokens: list[int]) -> bool:
        if not self.trained.share(source, row, tokens):
            return False
        self.lookup.extend(row, tokens, None)
        return True

    def propose(self, asks: list[DraftRequest]) -> list[Proposal]:
        proposals = self.lookup.propose(asks)
        unmatched = [i for i, proposal in enumerate(proposals) if not proposal.tokens]
        if unmatched:
            trained = self.trained.propose([asks[i] for i in unmatched])
            for i, proposal in zip(unmatched, trained, strict=True):
                proposals[i] = proposal
        return proposals

    def move(self, source: int, destination: int) -> None:
        self.lookup.move(source, destination)
        self.trained.move(source, destination)
