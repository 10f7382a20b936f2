"""Ways of decoding that meet on the same prompts: one after the other, on the same contexts and seeds.

How they are timed: `timing.py`. All runs of a turn see the same context (in a conversation the earlier answers are the
plain run's) and the same seed. Some need not be decoded: their rounds follow from another's answers (`forced.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from deepspec.decoding.cost import CostCurve
from deepspec.decoding.drafter import Drafter
from deepspec.decoding.engine import generate
from deepspec.decoding.request import Generation
from deepspec.decoding.scheduler import Controller
from deepspec.decoding.shapes import CHAIN, Shape
from deepspec.drafters.algorithms.lookup import TrainingFreeDrafter
from deepspec.evaluation.forced import ForcedTarget, decode_forced, price
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
class Computed:
    """Configurations that are not decoded: lookups, or any at T = 0.

    Args:
        along: the configuration whose answers they follow.
        curve: prices their passes.
    """

    configs: list[DecodingConfig]
    along: str
    curve: CostCurve

    def run(
        self, target: Target, turn: Turn, done: Mapping[str, tuple[Generation, float]]
    ) -> dict[str, tuple[Generation, float]]:
        """Return each one's generation and seconds, from what was decoded in this turn."""
        layers = {layer for config in self.configs if config.drafter for layer in config.drafter.layers}
        forced = ForcedTarget(target, turn.prompt_ids + done[self.along][0].tokens, sorted(layers))
        found = {}
        for drafter in {id(config.drafter): config.drafter for config in self.configs}.values():
            decode_forced(forced, drafter, turn.prompt_ids, 1, CHAIN)  # kernels for this length
        for config in self.configs:
            generation = decode_forced(
                forced, config.drafter, turn.prompt_ids, turn.max_new_tokens, config.tree
            )
            found[config.name] = generation, price(generation, *done[PLAIN], self.curve)
        return found


@dataclass(frozen=True)
class Contest:
    """A target and the configurations that are compared on it, `plain` among them.

    Args:
        plain_new_tokens: of a plain run whose answer no later turn needs; None: `max_new_tokens`.
        computed: more of them, which are not decoded.
    """

    target: Target
    configs: list[DecodingConfig]
    max_new_tokens: int
    seed: int
    plain_new_tokens: int | None = None
    computed: Computed | None = None

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
        further = self.computed.configs if self.computed else []
        runs = {config.name: Run() for config in self.configs}
        runs |= {config.name: Run(computed=True) for config in further}
        turns = turns_of(chat)
        answers: list[str] = []
        for number in range(len(turns)):
            ids = prompt_ids(self.target, chat, answers)
            seed = prompt_seed(self.seed, task, turns, number)
            for drafter in {id(config.drafter): config.drafter for config in order}.values():
                if drafter is not None and not isinstance(drafter, TrainingFreeDrafter):
                    generate(self.target, drafter, ids, max_new_tokens=1)  # its kernels for this length
            turn = Turn(ids, temperature, seed, self.max_new_tokens)
            plain = turn if number + 1 < len(turns) else self._last(turn)
            done = {
                config.name: timed(
                    EngineRuntime(self.target, config), plain if config.name == PLAIN else turn
                )
                for config in order
            }
            computed = self.computed.run(self.target, turn, done) if self.computed else {}
            for name, (generation, seconds) in {**done, **computed}.items():
                runs[name].add(generation, seconds)
            answer = done[PLAIN][0].tokens
            answers.append(str(self.target.tokenizer.decode(answer, skip_special_tokens=True)))
        return runs

    def _last(self, turn: Turn) -> Turn:
        """Return a turn as it is decoded plainly where no other follows."""
        return replace(
            turn, max_new_tokens=min(self.plain_new_tokens or turn.max_new_tokens, turn.max_new_tokens)
        )
