"""Ways of decoding that meet on the same prompts: one after the other, on the same contexts and seeds.

What makes the numbers honest. All runs of a turn see the same context (in a conversation the earlier answers are the
plain run's), the same seed and the same machine one right after the other, and who goes first moves on from prompt to
prompt. Seconds are wall-clock time of the whole call less the target's prefill, the work that all share: drafting,
verification, Python and what the draft itself makes of the prompt are all in.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from deepspec.decoding.drafter import Drafter
from deepspec.decoding.engine import generate
from deepspec.decoding.request import Generation
from deepspec.decoding.scheduler import Controller
from deepspec.decoding.tree import CHAIN, Shape
from deepspec.evaluation.runs import PLAIN, PromptRuns, Run, prompt_seed
from deepspec.target.model import Target

_WARM_UP_TOKENS = 32


@dataclass(frozen=True)
class Contestant:
    """A way of decoding; without a drafter the plain one."""

    name: str
    drafter: Drafter | None = None
    tree: Shape = CHAIN
    verify: str | None = None
    controller: Controller | None = None


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
            timed=True,
        )
        return generation, time.perf_counter() - start - generation.stats.prefill_s
