"""What one way of decoding did on one prompt: seconds, tokens and rounds, as the evaluation keeps them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from deepspec.evaluation.stats import Pair
from deepspec.files import digest

if TYPE_CHECKING:
    from deepspec.decoding.request import Generation

PLAIN = "plain"


@dataclass
class Run:
    """One configuration on one prompt, its turns in order.

    `accepted`, `drafted` and `verified` count tokens by turn and round.
    """

    seconds: float = 0.0  # less the target's prefill
    tokens: int = 0
    draft_s: float = 0.0
    verify_s: float = 0.0
    accepted: list[list[int]] = field(default_factory=list)
    drafted: list[list[int]] = field(default_factory=list)
    verified: list[list[int]] = field(default_factory=list)  # empty in runs of before
    prompt_tokens: list[int] = field(default_factory=list)  # of each turn; empty in runs of before
    output: str = ""  # digest of the token ids of all turns
    extra_passes: int = 0  # runs of the target beyond one a round, and
    fed: int = 0  # committed tokens that it ran again, both of targets that keep a state
    computed: bool = False  # not decoded: `forced.py`

    def add(self, generation: Generation, seconds: float) -> None:
        """Add a turn."""
        stats = generation.stats
        self.seconds += seconds
        self.tokens += len(generation.tokens)
        self.draft_s += stats.draft_s
        self.verify_s += stats.verify_s
        self.prompt_tokens.append(len(generation.prompt_ids))
        self.accepted.append(list(stats.accepted))
        self.drafted.append(list(stats.drafted))
        self.verified.append(list(stats.verified))
        self.extra_passes += sum(stats.passes) - stats.rounds
        self.fed += sum(stats.fed)
        self.output = digest(self.output + json.dumps(generation.tokens))

    @property
    def contexts(self) -> list[list[int]]:
        """Tokens before each round, of prompt and answer, by turn; no turns in runs of before."""
        return [
            [*accumulate((count + 1 for count in accepted), initial=prompt_tokens)][: len(accepted)]
            for prompt_tokens, accepted in zip(self.prompt_tokens, self.accepted, strict=False)
        ]

    @property
    def host_s(self) -> float:
        """What is neither drafting nor verifying: bookkeeping and Python."""
        return self.seconds - self.draft_s - self.verify_s

    @property
    def rounds(self) -> int:
        return sum(map(len, self.accepted))

    @property
    def committed(self) -> int:
        """Tokens that the rounds committed: the accepted ones, and one of the target's own each."""
        return sum(map(sum, self.accepted)) + self.rounds


PromptRuns = dict[str, Run]  # configuration → its run of one prompt


def to_json(runs: PromptRuns) -> dict[str, Any]:
    return {
        name: _without_zeros(asdict(run), "extra_passes", "fed", "computed") for name, run in runs.items()
    }


def _without_zeros(run: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in run.items() if value or name not in names}


def from_json(runs: dict[str, Any]) -> PromptRuns:
    return {name: Run(**run) for name, run in runs.items()}


def pair(plain: Run, other: Run) -> Pair:
    return Pair(plain.seconds, plain.tokens, other.seconds, other.tokens)


def tau_table(runs: Iterable[Run]) -> np.ndarray:
    """Return [prompts, 2]: tokens committed and rounds, the columns of `stats.quotient`."""
    return np.array([(run.committed, run.rounds) for run in runs], dtype=np.float64).reshape(-1, 2)


def prompt_seed(seed: int, task: str, turns: Sequence[Any], turn: int) -> int:
    """Of one turn: from what is asked, so that neither order nor the choice of other prompts changes an output.

    Args:
        turns: what is asked turn by turn, as JSON (`deepspec.tasks.dialogue.turns_of`).
    """
    return int(digest(json.dumps([seed, task, list(turns[: turn + 1])]))[:12], 16)
