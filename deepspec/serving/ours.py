"""The same prompts in our engine, counted as engines count: a chain, all of it verified, no lookup before the draft.

An engine's first draft comes after the first token, which the prompt's own pass gives, so ours starts there too: the
prompt with that token. An engine counts the last verification in full, whatever of it lies behind the answer's end;
so ours decodes on beyond the end, and counts up to the verification that reaches it. Seconds are of a run of its own,
which ends where the answer does, as plain decoding's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deepspec.decoding.request import Generation, Request
from deepspec.decoding.shapes import Chain
from deepspec.drafters.deployment import Deployment
from deepspec.errors import DeepSpecError
from deepspec.evaluation.stats import Pair
from deepspec.serving.protocols import Answer, Counts, Prompt

if TYPE_CHECKING:
    from deepspec.decoding.drafter import Drafter
    from deepspec.target.model import Target


@dataclass(frozen=True)
class Ours:
    """One prompt: the plain greedy answer, the drafted one, its counts, and decode seconds of both."""

    plain: list[int]
    drafted: list[int]
    counts: Counts
    pair: Pair


def decode(
    target: Target, drafter: Drafter, prompt_ids: list[int], tokens: int, speculative_tokens: int
) -> Ours:
    """Decode one prompt without and with the draft, at most `tokens` tokens."""
    alone, drafting = deployments(target, drafter, speculative_tokens)
    plain = _run(alone, Request(prompt_ids, tokens))
    first = plain.tokens[:1]
    beyond = tokens - 1 + speculative_tokens + 1
    request = Request(prompt_ids + first, beyond, stop_ids=frozenset())
    drafted = _run(drafting, request)
    ended = first[0] in target.stop_ids
    rest = [] if ended else _until_stop(drafted.tokens[: tokens - 1], target.stop_ids)
    counts = _counts(drafted, len(rest))
    timed = _run(drafting, Request(prompt_ids, tokens))
    pair = Pair(plain.stats.decode_s, len(plain.tokens), timed.stats.decode_s, len(timed.tokens))
    return Ours(plain.tokens, first + rest, counts, pair)


def deployments(target: Target, drafter: Drafter, speculative_tokens: int) -> tuple[Deployment, Deployment]:
    """Return our engine plain, and with the draft: a chain, all of it verified."""
    return Deployment(target), Deployment(target, drafter, Chain(speculative_tokens))


def timed(deployment: Deployment, prompt: Prompt, tokens: int) -> Answer:
    """Decode one prompt, at most `tokens` tokens. The rounds are timed, the prompt's pass is not."""
    done = _run(deployment, Request(prompt.ids, tokens))
    return Answer(done.tokens, done.stats.decode_s, done.stats.committed)


def _run(deployment: Deployment, request: Request) -> Generation:
    requests = iter([request])
    (done,) = deployment.engine(timed=True).run(lambda: next(requests, None))
    if done.error:
        raise DeepSpecError(done.error)
    return done


def _until_stop(tokens: list[int], stop_ids: frozenset[int]) -> list[int]:
    stop = next((i for i, token in enumerate(tokens) if token in stop_ids), None)
    return tokens if stop is None else tokens[: stop + 1]


def _counts(generation: Generation, needed: int) -> Counts:
    """Count the verifications that had a draft, up to the one that commits the token `needed`."""
    accepted, drafted, committed = [], 0, 0
    for stood, proposed in zip(generation.stats.accepted, generation.stats.drafted, strict=True):
        if committed >= needed:
            break
        committed += stood + 1
        if proposed:
            accepted.append(stood)
            drafted += proposed
    longest = max(generation.stats.drafted, default=0)
    by_position = tuple(sum(stood > i for stood in accepted) for i in range(longest))
    return Counts(len(accepted), drafted, sum(accepted), by_position)
