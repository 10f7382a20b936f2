"""States that the target's passes leave behind while it decodes, kept for whoever wants to learn from them.

The kernels give a token the same bits whatever it is decoded with, so what a request leaves is what a pass over
the finished text would compute anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepspec.target.ends import H_LAST
from deepspec.target.model import Target

_FIRST = 256  # tokens that a row has room for at first


@dataclass(frozen=True)
class Recorded:
    """What a request's tokens left, prompt and answer: layer → [n, d], `H_LAST` among them; log_norm float32 [n]."""

    states: dict[int, Tensor]
    log_norm: Tensor


class _Row:
    """A request's states so far, `width` numbers a token, in room that doubles."""

    def __init__(self, width: int, dtype: torch.dtype):
        self.states = torch.empty(_FIRST, width, dtype=dtype)
        self.log_norm = torch.empty(_FIRST)
        self.size = 0

    def append(self, states: Tensor, log_norm: Tensor) -> None:
        end = self.size + len(states)
        if end > len(self.states):
            more = max(end - len(self.states), len(self.states))
            self.states = torch.cat([self.states, self.states.new_empty(more, self.states.shape[1])])
            self.log_norm = torch.cat([self.log_norm, self.log_norm.new_empty(more)])
        self.states[self.size : end] = states
        self.log_norm[self.size : end] = log_norm
        self.size = end


class Recorder:
    """Follows the rows of an engine that drafts nothing.

    A finished request stays in its row for one more pass, that of its last token.

    Args:
        target: one of whose tokens the bits do not depend on their company (`can_record`).
        layers: whose outputs are wanted beside the post-norm state.
    """

    def __init__(self, target: Target, layers: Sequence[int]):
        self.target = target
        self.layers = (*(layer for layer in dict.fromkeys(layers) if layer != H_LAST), H_LAST)
        self._rows: dict[int, _Row] = {}
        self._done: dict[Any, Recorded] = {}

    @property
    def bytes_a_token(self) -> int:
        """Return the memory that a token of a request in flight takes."""
        return len(self.layers) * self.target.hidden_size * self.target.dtype.itemsize

    @staticmethod
    def can_record(target: Target) -> bool:
        """Return whether a token's states and law are the same, to the bit, in every pass."""
        return target.native and target.head_transform.plain

    def begin(self, row: int) -> None:
        """Give the row to a fresh request."""
        self._rows[row] = _Row(len(self.layers) * self.target.hidden_size, self.target.dtype)

    def share(self, source: int, row: int, length: int) -> None:
        """Take another request's first tokens for a row's own, which are the same."""
        other = self._rows[source]
        self._rows[row].append(other.states[:length], other.log_norm[:length])

    def prompt(self, row: int, states: Tensor) -> None:
        """Add the states [n, len(layers)·d] of a piece of a prompt."""
        self._rows[row].append(states, self.target.log_norm(states[:, -self.target.hidden_size :]))

    def step(self, rows: Sequence[int], states: Tensor, logits: Tensor) -> None:
        """Add the states [rows, len(layers)·d] and logits [rows, vocab] of a token of each row."""
        log_norm = self.target.log_norm_of(logits)
        for i, row in enumerate(rows):
            self._rows[row].append(states[i : i + 1], log_norm[i : i + 1])

    def has_all(self, row: int, tokens: int) -> bool:
        """Return whether all tokens of a row have been through the target."""
        return self._rows[row].size == tokens

    def move(self, source: int, destination: int) -> None:
        """Move what a row holds, where the engine moves its request."""
        self._rows[destination] = self._rows.pop(source)

    def finish(self, row: int, id: Any) -> None:
        """Put what a request left where `take` finds it."""
        own = self._rows.pop(row)
        parts = own.states[: own.size].split(self.target.hidden_size, dim=-1)
        self._done[id] = Recorded(
            dict(zip(self.layers, parts, strict=True)), own.log_norm[: own.size].clone()
        )

    def drop(self, row: int) -> None:
        """Forget a request that failed."""
        self._rows.pop(row)

    def take(self, id: Any) -> Recorded | None:
        """Return what a finished request left, once; None for one that failed."""
        return self._done.pop(id, None)
