"""One request in flight: what is committed, when it stops, and its own randomness."""

from __future__ import annotations

import torch
from torch import Tensor

from deepspec.decoding.pacing import DraftPacer
from deepspec.decoding.request import Generation, Request, Stats
from deepspec.decoding.sampling import draw
from deepspec.target.model import Target

_BROKEN = "\ufffd"  # what decoding puts in place of half a character
_LONGEST_CHARACTER = 4  # bytes
_SLACK = 8  # tokens


class Slot:
    """`tokens` are all committed ids; the KV cache holds all but the last one, the anchor."""

    def __init__(self, request: Request, target: Target, max_length: int):
        self.request = request
        self.target = target
        self.tokens = list(request.prompt_ids)
        self.stop_ids = target.stop_ids if request.stop_ids is None else request.stop_ids
        self.limit = min(request.max_new_tokens, max_length - len(self.tokens))
        self.rng = torch.Generator().manual_seed(request.seed)
        self.stats = Stats()
        self.pacer: DraftPacer | None = None  # the controller's, where there is one
        self.finish_reason: str | None = None
        self.error: str | None = None

    @property
    def anchor(self) -> int:
        return self.tokens[-1]

    @property
    def cached(self) -> int:
        return len(self.tokens) - 1

    @property
    def new_tokens(self) -> list[int]:
        return self.tokens[len(self.request.prompt_ids) :]

    @property
    def room(self) -> int:
        """Tokens that may still be committed."""
        return self.limit - len(self.tokens) + len(self.request.prompt_ids)

    def uniform(self) -> float:
        return float(self.uniforms(1))

    def uniforms(self, count: int) -> Tensor:
        """Return the next numbers in [0, 1) of the request's own randomness, float64 [count]."""
        return torch.rand(count, generator=self.rng, dtype=torch.float64)

    def pick(self, weights: Tensor) -> int:
        """Draw a token with probability proportional to `weights` [vocab]."""
        uniform = torch.tensor([self.uniform()], dtype=torch.float64, device=weights.device)
        return int(draw(weights[None], uniform))

    def commit(self, accepted: list[int], last: int) -> int:
        """Append the accepted tokens and the target's own, cut at a stop or the limit. Returns the count."""
        room = self.room
        tokens = [*accepted, last][:room]
        stop = self._stop(tokens)
        if stop is not None:
            tokens = tokens[: stop + 1]
            self.finish_reason = "stop"
        elif len(tokens) == room:
            self.finish_reason = "length"
        self.tokens += tokens
        self.stats.accepted.append(len(tokens) - 1)
        if self.request.on_tokens:
            self.request.on_tokens(tokens, min(len(accepted), len(tokens)))
        return len(tokens)

    def _stop(self, tokens: list[int]) -> int | None:
        """Index of the first of `tokens` that ends the answer: a stop token, or the last one of a stop string."""
        first = next((i for i, token in enumerate(tokens) if token in self.stop_ids), None)
        if not self.request.stop:
            return first
        before = self.new_tokens
        for i in range(len(tokens) if first is None else first):
            text = self._ending([*before, *tokens[: i + 1]])
            if any(stop in text for stop in self.request.stop):
                return i
        return first

    def _ending(self, answer: list[int]) -> str:
        """Decode as many of an answer's last tokens as a stop string may have, whatever the round brought of them.

        A token has a byte at least, or nothing. Half a character at the beginning would spoil what follows it (where
        bytes are tokens of their own, a whole run of them), so decoding begins with a character.
        """
        most = 2 * max(len(stop.encode()) for stop in self.request.stop) + _SLACK
        text = self.target.tokenizer.decode(answer[-most:])
        for dropped in range(1, _LONGEST_CHARACTER):
            if len(answer) <= most or not text.startswith(_BROKEN):
                break
            text = self.target.tokenizer.decode(answer[dropped - most :])
        return text

    def result(self) -> Generation:
        reason = "error" if self.error else str(self.finish_reason)
        return Generation(
            self.request.id, self.request.prompt_ids, self.new_tokens, reason, self.stats, self.error
        )
