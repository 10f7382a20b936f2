"""`reports/serve/<drafter>-<engine>.json`: what an engine made of a draft beside what ours does, and the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deepspec.errors import DeepSpecError
from deepspec.evaluation.stats import Pair, against, bootstrap, quotient, speedup
from deepspec.serving.ours import Ours
from deepspec.serving.protocols import Answer, Counts, Prompt

SERVE_VERSION = "1"
LEAST_RATIO = 0.95
UNSTEADY = 0.1  # plain runs that differ by more than this share
FEW = 100  # verifications
CHECKS = "layer ids, block layout, final norm, RoPE, template (docs/deploy.md)"


@dataclass
class Measured:
    """All answers, prompt by prompt: the engine's drafted and plain ones (a list a run), and ours."""

    prompts: list[Prompt]
    drafted: list[Answer]
    plain: list[list[Answer]]
    ours: list[Ours]
    warnings: list[str] = field(default_factory=list)


def check_target(answers: Sequence[Answer], ours: Sequence[Ours], url: str) -> None:
    """The first tokens must be the target's: they tell another model, template or tokenizer.

    Raises:
        DeepSpecError: half of the answers or more begin otherwise.
    """
    same = sum(answer.tokens[:1] == mine.plain[:1] for answer, mine in zip(answers, ours, strict=True))
    if 2 * same <= len(ours):
        raise DeepSpecError(
            f"{url}: {len(ours) - same} of {len(ours)} answers begin with another token than the target's: "
            "another model, tokenizer or chat template is served there"
        )


def compare(measured: Measured, engine: str, gated: bool = True) -> dict[str, Any]:
    """The measured part of a record. `gated`: a ratio below 0.95 is a failure."""
    served, own = _sum(a.counts for a in measured.drafted), _sum(o.counts for o in measured.ours)
    if not served.drafts:
        raise DeepSpecError(f"{engine} verified no draft at all; is it served with one?")
    rows = [
        (*_pair(mine.counts), *_pair(answer.counts))
        for answer, mine in zip(measured.drafted, measured.ours, strict=True)
    ]
    ratio = bootstrap([np.array(rows, dtype=np.float64)], against(quotient))
    speeds = [tokens_per_second(run) for run in measured.plain]
    record = {
        "prompts": len(measured.prompts),
        "new_tokens": sum(len(answer.tokens) for answer in measured.drafted),
        "served": _section(served, engine_pairs(measured), tokens_per_second(measured.drafted))
        | {"plain_runs": speeds},
        "ours": _section(own, [mine.pair for mine in measured.ours]),
        "ratio_accepted_length": ratio and ratio.value,
        "ratio_ci95": ratio and ratio.bounds,
        "tasks": _by_task(measured),
        "outputs": _outputs(measured),
    }
    return record | {
        "warnings": measured.warnings + _warnings(record, engine),
        "failures": _failures(record, engine) if gated else [],
    }


def engine_pairs(measured: Measured) -> list[Pair]:
    """Seconds and tokens of each prompt in the engine; all plain runs together."""
    pairs = []
    for i, answer in enumerate(measured.drafted):
        plain = [run[i] for run in measured.plain]
        seconds, tokens = sum(a.seconds for a in plain), sum(a.timed_tokens for a in plain)
        pairs.append(Pair(seconds, tokens, answer.seconds, answer.timed_tokens))
    return pairs


def tokens_per_second(answers: Sequence[Answer]) -> float | None:
    seconds = sum(answer.seconds for answer in answers)
    return sum(answer.timed_tokens for answer in answers) / seconds if seconds > 0 else None


def first_difference(a: list[int], b: list[int]) -> int | None:
    """Tokens before the first that differs, or before the end of the shorter one; None where they are the same."""
    if a == b:
        return None
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _section(counts: Counts, pairs: list[Pair], speed: float | None = None) -> dict[str, Any]:
    plain_s, drafted_s = sum(p.plain_s for p in pairs), sum(p.drafted_s for p in pairs)
    faster = speedup(pairs)
    return {
        "mean_accepted_length": counts.mean_accepted_length,
        "accept_rate_by_position": counts.accept_rate_by_position,
        "drafts": counts.drafts,
        "draft_tokens": counts.drafted,
        "accepted_tokens": counts.accepted,
        "tokens_per_second": speed
        or (sum(p.drafted_tokens for p in pairs) / drafted_s if drafted_s else None),
        "tokens_per_second_plain": sum(p.plain_tokens for p in pairs) / plain_s if plain_s else None,
        "speedup": faster and faster.value,
        "speedup_ci95": faster and faster.bounds,
    }


def _by_task(measured: Measured) -> dict[str, dict[str, float | None]]:
    found = {}
    for task in dict.fromkeys(prompt.task for prompt in measured.prompts):
        mine = [i for i, prompt in enumerate(measured.prompts) if prompt.task == task]
        found[task] = {
            "prompts": len(mine),
            "served": _sum(measured.drafted[i].counts for i in mine).mean_accepted_length,
            "ours": _sum(measured.ours[i].counts for i in mine).mean_accepted_length,
        }
    return found


def _outputs(measured: Measured) -> dict[str, dict[str, Any] | None]:
    """Greedy answers compared. In bfloat16 near ties may fall either way; in float32 all but ties must agree."""
    drafted, own = [a.tokens for a in measured.drafted], [o.plain for o in measured.ours]
    plain = [a.tokens for a in measured.plain[0]] if measured.plain else None
    return {
        "drafted_vs_plain": plain and _agreement(plain, drafted),
        "plain_vs_ours": plain and _agreement(own, plain),
        "drafted_vs_ours": _agreement(own, drafted),
    }


def _agreement(references: list[list[int]], others: list[list[int]]) -> dict[str, Any]:
    places = [first_difference(a, b) for a, b in zip(references, others, strict=True)]
    differ = [place for place in places if place is not None]
    return {"identical": len(places) - len(differ), "prompts": len(places), "first_differences": differ}


def _warnings(record: dict[str, Any], engine: str) -> list[str]:
    found = []
    speeds = [speed for speed in record["served"]["plain_runs"] if speed]
    if len(speeds) > 1 and max(speeds) > (1 + UNSTEADY) * min(speeds):
        found.append(
            f"plain decoding in {engine} ran at {min(speeds):.1f} and {max(speeds):.1f} tokens/s: other work on this "
            "machine makes the speed-up uncertain"
        )
    if record["served"]["drafts"] < FEW:
        found.append(f"only {record['served']['drafts']} verifications; more prompts narrow the interval")
    same = record["outputs"]["drafted_vs_plain"]
    if same and same["first_differences"]:
        found.append(
            f"{engine}'s drafted answers differ from its plain ones in {len(same['first_differences'])} of "
            f"{same['prompts']} prompts: rounding in bfloat16, or a fault; --dtype float32 tells"
        )
    return found


def _failures(record: dict[str, Any], engine: str) -> list[str]:
    ratio = record["ratio_accepted_length"]
    if ratio is not None and ratio >= LEAST_RATIO:
        return []
    lengths = (record[side]["mean_accepted_length"] or float("nan") for side in ("served", "ours"))
    served, own = lengths
    return [
        f"{engine} accepts {served:.2f} tokens a verification where our engine accepts {own:.2f} (ratio "
        f"{served / own:.2f}, at least {LEAST_RATIO} is asked for): check {CHECKS}"
    ]


def _sum(counts: Any) -> Counts:
    return sum(counts, Counts())


def _pair(counts: Counts) -> tuple[int, int]:
    return counts.accepted + counts.drafts, counts.drafts
