"""What goes into the engine and what comes out of it: plain data, no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from deepspec.errors import DeepSpecError


@dataclass(frozen=True)
class Sampling:
    """The sampler whose law is preserved: softmax(logits / temperature), cut by top-k, top-p and min-p.

    temperature 0 is greedy. top_k 0, top_p 1 and min_p 0 cut nothing.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise DeepSpecError(f"temperature must be finite and >= 0, found {self.temperature}")
        if self.top_k < 0:
            raise DeepSpecError(f"top_k must be >= 0, found {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise DeepSpecError(f"top_p must be in (0, 1], found {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise DeepSpecError(f"min_p must be in [0, 1], found {self.min_p}")

    @property
    def cuts(self) -> bool:
        """Whether tokens are left out."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


@dataclass
class Request:
    """One prompt to continue.

    `on_tokens(tokens, accepted)` is called after every round with the committed tokens and how many of them
    (the leading ones) came from the draft.
    """

    prompt_ids: list[int]
    max_new_tokens: int = 256
    _: KW_ONLY
    sampling: Sampling = Sampling()
    seed: int = 0
    stop_ids: frozenset[int] | None = None  # None: the target's own stop tokens
    id: Any = None
    on_tokens: Callable[[list[int], int], None] | None = None
    stop: tuple[str, ...] = ()  # strings that end the answer too


@dataclass
class Stats:
    """Counts and seconds of one request. A round is one target pass that verifies a draft (or none)."""

    accepted: list[int] = field(default_factory=list)  # draft tokens accepted, per round
    drafted: list[int] = field(default_factory=list)  # draft tokens proposed, per round (longest path)
    prefill_s: float = 0.0
    draft_s: float = 0.0
    verify_s: float = 0.0
    host_s: float = 0.0
    verified: list[int] = field(default_factory=list)  # draft tokens that the target looked at, per round
    fed: list[int] = field(default_factory=list)  # committed tokens that a state needed again, per round
    passes: list[int] = field(default_factory=list)  # runs of the target, per round: 1 but for such states

    @property
    def rounds(self) -> int:
        return len(self.accepted)

    @property
    def committed(self) -> int:
        """Tokens committed by the rounds: the accepted ones and one from the target each."""
        return sum(self.accepted) + len(self.accepted)

    @property
    def tau(self) -> float:
        """Tokens committed per verification, the target's own token included."""
        return self.committed / self.rounds if self.rounds else 0.0

    @property
    def decode_s(self) -> float:
        return self.draft_s + self.verify_s + self.host_s


@dataclass
class Generation:
    """A finished request.

    Where finish_reason is "stop", `tokens` ends with the stop token or the one that completed a stop string.
    """

    id: Any
    prompt_ids: list[int]
    tokens: list[int]
    finish_reason: str  # stop | length | error
    stats: Stats
    error: str | None = None
