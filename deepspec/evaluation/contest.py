"""Ways of decoding that meet on the same prompts: one after the other, on the same contexts and seeds.

How they are timed: `timing.py`. All runs of a turn see the same context (in a conversation the earlier answers are the
plain run's) and the same seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deepspec.decoding.drafter import Drafter
from deepspec.decoding.engine import generate
from deepspec.decoding.request import Generation
from deepspec.decoding.scheduler import Controller
from deepspec.decoding.shapes import CHAIN, Shape
from deepspec.evaluation.runs import PLAIN, PromptRuns, Run, prompt_seed
from deepspec.evaluation.timing import WARM_UP_TOKENS, rotated, timed, warm_up
from deepspec.messages.prompt import Chat
from deepspec.target.model import Target
from deepspec.tasks.dialogue import prompt_ids, turns_of


@dataclass(frozen=True)
class DecodingConfig:
    """What is compared: a drafter with all that decides how it decodes; without a drafter, plain decoding."""

    name: str
    drafter: Drafter | None = None
    tree: Shape = CHAIN
    verify: str | None = None
    controller: Controller | None = None


@dataclass(frozen=True)
class Turn:
    """What all configurations decode: the context of one answer."""

    prompt_ids: list[int]
    temperature: float
    seed: int
    max_new_tokens: int


@dataclass(frozen=True)
class EngineRuntime:
    """Our engine, one request at a time; it reports the target's prefill itself."""

    target: Target
    config: DecodingConfig

    def decode(self, turn: Turn) -> Generation:
        (generation,) = generate(
            self.target,
            self.config.drafter,
            turn.prompt_ids,
            max_new_tokens=turn.max_new_tokens,
            temperature=turn.temperature,
            seed=turn.seed,
            tree=self.config.tree,
            verify=self.config.verify,
            controller=self.config.controller,
            timed=True,
        )
        return generation

    def prefill_s(self, turn: Turn, generation: Generation) -> float:
        return generation.stats.prefill_s


@dataclass(frozen=True)
class Contest:
    """A target and the configurations that are compared on it, `plain` among them."""

    target: Target
    configs: list[DecodingConfig]
    max_new_tokens: int
    seed: int

    def warm_up(self, longest: Chat, temperatures: Sequence[float]) -> None:
        """Decode the longest prompt with each configuration at each temperature."""
        ids = prompt_ids(self.target, longest)
        tokens = min(self.max_new_tokens, WARM_UP_TOKENS)
        runtimes = [EngineRuntime(self.target, config) for config in self.configs]
        for temperature in temperatures:
            warm_up(runtimes, Turn(ids, temperature, 0, tokens))

    def prompt(self, task: str, chat: Chat, temperature: float, index: int) -> PromptRuns:
        """Decode one conversation, turn by turn; configuration `index`, counted round, goes first."""
        order = rotated(self.configs, index)
        runs = {config.name: Run() for config in self.configs}
        turns = turns_of(chat)
        answers: list[str] = []
        for number in range(len(turns)):
            ids = prompt_ids(self.target, chat, answers)
            seed = prompt_seed(self.seed, task, turns, number)
            for drafter in {id(config.drafter): config.drafter for config in order}.values():
                generate(self.target, drafter, ids, max_new_tokens=1)  # kernels for this length
            turn = Turn(ids, temperature, seed, self.max_new_tokens)
            for config in order:
                generation, seconds = timed(EngineRuntime(self.target, config), turn)
                runs[config.name].add(generation, seconds)
                if config.name == PLAIN:
                    answer = generation.tokens
            answers.append(str(self.target.tokenizer.decode(answer, skip_special_tokens=True)))
        return runs
