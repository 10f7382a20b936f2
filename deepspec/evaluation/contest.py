"""Ways of decoding that meet on the same prompts: one after the other, on the same contexts and seeds.

What makes the numbers honest. All runs of a turn see the same context (in a conversation the earlier answers are the
plain run's), the same seed and the same machine one right after the other, and who goes first moves on from prompt to
prompt. Seconds are wall-clock time of the whole call less the target's prefill, the work that all share: drafting,
verification, Python and what the draft itself makes of the prompt are all in.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from deepspec.decoding.engine import generate
from deepspec.decoding.request import Generation
from deepspec.decoding.scheduler import Controller
from deepspec.decoding.tree import CHAIN, Shape
from deepspec.drafters.base import Drafter
from deepspec.evaluation.stats import Pair
from deepspec.files import digest
from deepspec.target import Target

PLAIN = "plain"
_WARM_UP_TOKENS = 32


@dataclass(frozen=True)
class Contestant:
    """A way of decoding; without a drafter the plain one."""

    name: str
    drafter: Drafter | None = None
    tree: Shape = CHAIN
    verify: str | None = None
    controller: Controller | None = None


@dataclass
class Run:
    """One contestant on one prompt, its turns in order. `accepted` and `drafted` count tokens by turn and round."""

    seconds: float = 0.0  # less the target's prefill
    tokens: int = 0
    draft_s: float = 0.0
    verify_s: float = 0.0
    accepted: list[list[int]] = field(default_factory=list)
    drafted: list[list[int]] = field(default_factory=list)
    output: str = ""  # digest of the token ids of all turns

    def add(self, generation: Generation, seconds: float) -> None:
        """Add a turn."""
        stats = generation.stats
        self.seconds += seconds
        self.tokens += len(generation.tokens)
        self.draft_s += stats.draft_s
        self.verify_s += stats.verify_s
        self.accepted.append(list(stats.accepted))
        self.drafted.append(list(stats.drafted))
        self.output = digest(self.output + json.dumps(generation.tokens))

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


PromptRuns = dict[str, Run]  # contestant → its run of one prompt


def to_json(runs: PromptRuns) -> dict[str, Any]:
    return {name: asdict(run) for name, run in runs.items()}


def from_json(runs: dict[str, Any]) -> PromptRuns:
    return {name: Run(**run) for name, run in runs.items()}


def pair(plain: Run, other: Run) -> Pair:
    return Pair(plain.seconds, plain.tokens, other.seconds, other.tokens)


def prompt_seed(seed: int, task: str, turns: Sequence[str], turn: int) -> int:
    """Of one turn: from what is asked, so that neither order nor the choice of other prompts changes an output."""
    return int(digest(json.dumps([seed, task, list(turns[: turn + 1])]))[:12], 16)


@dataclass(frozen=True)
class Contest:
    """A target and the contestants, `plain` first."""

    target: Target
    contestants: list[Contestant]
    max_new_tokens: int
    seed: int

    def warm_up(self, longest: str, temperatures: Sequence[float]) -> None:
        """Kernels, caches and compiled shapes are made before the clock starts."""
        prompt_ids = self.target.chat_ids([{"role": "user", "content": longest}])
        tokens = min(self.max_new_tokens, _WARM_UP_TOKENS)
        for temperature in temperatures:
            for contestant in self.contestants:
                self._timed(contestant, prompt_ids, temperature, 0, tokens)

    def prompt(self, task: str, turns: list[str], temperature: float, index: int) -> PromptRuns:
        """One conversation, turn by turn; contestant `index` goes first (of those there are, counted round)."""
        first = index % len(self.contestants)
        order = [*self.contestants[first:], *self.contestants[:first]]
        runs = {contestant.name: Run() for contestant in self.contestants}
        messages: list[dict[str, str]] = []
        for turn, text in enumerate(turns):
            messages.append({"role": "user", "content": text})
            prompt_ids = self.target.chat_ids(messages)
            seed = prompt_seed(self.seed, task, turns, turn)
            for drafter in {id(contestant.drafter): contestant.drafter for contestant in order}.values():
                generate(self.target, drafter, prompt_ids, max_new_tokens=1)  # kernels for this length
            for contestant in order:
                generation, seconds = self._timed(
                    contestant, prompt_ids, temperature, seed, self.max_new_tokens
                )
                runs[contestant.name].add(generation, seconds)
                if contestant.name == PLAIN:
                    answer = generation.tokens
            content = self.target.tokenizer.decode(answer, skip_special_tokens=True)
            messages.append({"role": "assistant", "content": content})
        return runs

    def _timed(
        self, contestant: Contestant, prompt_ids: list[int], temperature: float, seed: int, tokens: int
    ) -> tuple[Generation, float]:
        """A generation and its wall-clock seconds, less the target's prefill."""
        start = time.perf_counter()
        (generation,) = generate(
            self.target,
            contestant.drafter,
            prompt_ids,
            max_new_tokens=tokens,
            temperature=temperature,
            seed=seed,
            tree=contestant.tree,
            verify=contestant.verify,
            controller=contestant.controller,
        )
        return generation, time.perf_counter() - start - generation.stats.prefill_s
