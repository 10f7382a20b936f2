"""`reports/serve/<drafter>-<engine>.json`: what an engine made of a draft beside what ours does, and the verdict."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field, ValidationError

from deepspec.errors import DeepSpecError
from deepspec.evaluation.parts import Bounds, Part, Provenance
from deepspec.evaluation.record import first_mistake
from deepspec.evaluation.stats import Pair, against, bootstrap, quotient, speedup
from deepspec.files import write_json
from deepspec.serving.protocols import Answer, Counts, Prompt

if TYPE_CHECKING:
    from deepspec.serving.ours import Ours

SERVE_VERSION = "1"
LEAST_RATIO = 0.95
UNSTEADY = 0.1  # plain runs that differ by more than this share
FEW = 100  # verifications
CHECKS = "layer ids, block layout, final norm, RoPE, template (docs/deploy.md)"


class Section(Part):
    """What one engine did with the draft."""

    mean_accepted_length: float | None = Field(description="tokens a verification, the target's own included")
    accept_rate_by_position: list[float | None] = Field(
        description="of the verifications that accepted all before a position, the share that accepted it too; null "
        "where none did"
    )
    drafts: int = Field(description="verifications")
    draft_tokens: int = Field(description="tokens drafted")
    accepted_tokens: int = Field(description="drafted tokens accepted")
    tokens_per_second: float | None = Field(description="tokens/s with the draft")
    tokens_per_second_plain: float | None = Field(description="tokens/s without it")
    speedup: float | None = Field(description="seconds a token without the draft over those with it")
    speedup_ci95: Bounds | None = Field(description="95 % interval of the speed-up, by prompts")


class Served(Section):
    """What the serving engine did with the draft."""

    plain_runs: list[float | None] = Field(
        description="tokens/s of each plain run: before and after the drafts"
    )


class TaskLengths(Part):
    """Tokens a verification on one task."""

    prompts: int = Field(description="prompts of the task")
    served: float | None = Field(description="tokens a verification in the serving engine")
    ours: float | None = Field(description="tokens a verification in this engine")


class Agreement(Part):
    """Greedy answers of two runs compared."""

    identical: int = Field(description="prompts with the same answer")
    prompts: int = Field(description="prompts compared")
    first_differences: list[int] = Field(
        description="tokens before the first that differs, of each that differs"
    )


class Outputs(Part):
    """Greedy answers compared: in bfloat16 near ties may fall either way, in float32 all but ties must agree."""

    drafted_vs_plain: Agreement | None = Field(description="the serving engine with and without the draft")
    plain_vs_ours: Agreement | None = Field(
        description="plain decoding in the serving engine and in this one"
    )
    drafted_vs_ours: Agreement = Field(
        description="the serving engine with the draft and plain decoding in this one"
    )


class Figures(Part):
    """The measured part of a record."""

    prompts: int = Field(description="prompts answered")
    new_tokens: int = Field(description="tokens that the serving engine wrote with the draft")
    served: Served = Field(description="figures of the serving engine")
    ours: Section = Field(description="figures of this engine")
    ratio_accepted_length: float | None = Field(description="tokens a verification there over those here")
    ratio_ci95: Bounds | None = Field(description="95 % interval of the ratio, by prompts")
    tasks: dict[str, TaskLengths] = Field(description="tokens a verification by task")
    outputs: Outputs = Field(description="greedy answers compared")
    warnings: list[str] = Field(description="what makes the figures weaker than they look")
    failures: list[str] = Field(description="why the draft does not pass; empty: it passes")


class About(Part):
    """What both engines were measured on."""

    serve_version: str = Field(description="numbers of two versions cannot be compared")
    engine: str = Field(description="the serving engine")
    timing: str = Field(description="between which tokens the serving engine is timed")
    target: str = Field(description="where the target came from")
    target_digest: str = Field(description="digest of the target's files")
    dtype: str = Field(description="precision of the target")
    device: str = Field(description="machine and software it was measured on")
    temperature: float = Field(description="temperature of sampling")
    max_new_tokens: int = Field(description="tokens of an answer at most")
    provenance: Provenance = Field(description="code, command and packages that made the record")


class _Subject(Part):
    engine_version: str | None = Field(description="version of the serving engine, where it tells")
    drafter: str = Field(description="the draft's name in params.yaml")
    draft_digest: str = Field(description="digest of the draft's files")
    method: str | None = Field(description="the engine's own name of the kind of draft")
    speculative_tokens: int = Field(description="tokens drafted at most")


class ServingRecord(Figures, _Subject, About):
    """All that was measured of one draft in one serving engine."""

    @classmethod
    def read(cls, path: str | Path) -> ServingRecord:
        """Read a record from its file.

        Raises:
            DeepSpecError: not of this shape.
        """
        try:
            found = cls.model_validate(json.loads(Path(path).read_text()))
        except ValidationError as error:
            raise DeepSpecError(
                f"{path}: not a serving record: {first_mistake(error)}; run deepspec serve-check again"
            ) from None
        except (OSError, ValueError) as error:
            raise DeepSpecError(f"{path}: no serving record ({error}); run deepspec serve-check") from None
        if found.serve_version != SERVE_VERSION:
            raise DeepSpecError(
                f"{path}: of serving version {found.serve_version}, not {SERVE_VERSION}; run deepspec serve-check again"
            )
        return found

    def write(self, path: str | Path) -> None:
        """Write the record to its file."""
        write_json(path, self.model_dump(mode="json"))


@dataclass
class Measured:
    """All answers, prompt by prompt: the engine's drafted and plain ones (a list a run), and ours."""

    prompts: list[Prompt]
    drafted: list[Answer]
    plain: list[list[Answer]]
    ours: list[Ours]
    warnings: list[str] = field(default_factory=list)


def check_target(answers: Sequence[Answer], ours: Sequence[Ours], url: str) -> None:
    """Check that the first tokens are the target's: they tell another model, template or tokenizer.

    Raises:
        DeepSpecError: half of the answers or more begin otherwise.
    """
    same = sum(answer.tokens[:1] == mine.plain[:1] for answer, mine in zip(answers, ours, strict=True))
    if 2 * same <= len(ours):
        raise DeepSpecError(
            f"{url}: {len(ours) - same} of {len(ours)} answers begin with another token than the target's: "
            "another model, tokenizer or chat template is served there"
        )


def compare(measured: Measured, engine: str, gated: bool = True) -> Figures:
    """Return the measured part of a record. `gated`: a ratio below 0.95 is a failure."""
    served, own = _sum(a.counts for a in measured.drafted), _sum(o.counts for o in measured.ours)
    if not served.drafts:
        raise DeepSpecError(f"{engine} verified no draft at all; is it served with one?")
    rows = [
        (*_pair(mine.counts), *_pair(answer.counts))
        for answer, mine in zip(measured.drafted, measured.ours, strict=True)
    ]
    ratio = bootstrap([np.array(rows, dtype=np.float64)], against(quotient))
    speeds = [tokens_per_second(run) for run in measured.plain]
    served_section = Served(
        **dict(_section(served, engine_pairs(measured), tokens_per_second(measured.drafted))),
        plain_runs=speeds,
    )
    own_section = _section(own, [mine.pair for mine in measured.ours])
    outputs = _outputs(measured)
    return Figures(
        prompts=len(measured.prompts),
        new_tokens=sum(len(answer.tokens) for answer in measured.drafted),
        served=served_section,
        ours=own_section,
        ratio_accepted_length=ratio.value if ratio else None,
        ratio_ci95=ratio.bounds if ratio else None,
        tasks=_by_task(measured),
        outputs=outputs,
        warnings=measured.warnings + _warnings(served_section, outputs, engine),
        failures=_failures(served_section, own_section, ratio.value if ratio else None, engine)
        if gated
        else [],
    )


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


def _section(counts: Counts, pairs: list[Pair], speed: float | None = None) -> Section:
    plain_s, drafted_s = sum(p.plain_s for p in pairs), sum(p.drafted_s for p in pairs)
    faster = speedup(pairs)
    return Section(
        mean_accepted_length=counts.mean_accepted_length,
        accept_rate_by_position=counts.accept_rate_by_position,
        drafts=counts.drafts,
        draft_tokens=counts.drafted,
        accepted_tokens=counts.accepted,
        tokens_per_second=speed or (sum(p.drafted_tokens for p in pairs) / drafted_s if drafted_s else None),
        tokens_per_second_plain=sum(p.plain_tokens for p in pairs) / plain_s if plain_s else None,
        speedup=faster and faster.value,
        speedup_ci95=faster and faster.bounds,
    )


def _by_task(measured: Measured) -> dict[str, TaskLengths]:
    found = {}
    for task in dict.fromkeys(prompt.task for prompt in measured.prompts):
        mine = [i for i, prompt in enumerate(measured.prompts) if prompt.task == task]
        found[task] = TaskLengths(
            prompts=len(mine),
            served=_sum(measured.drafted[i].counts for i in mine).mean_accepted_length,
            ours=_sum(measured.ours[i].counts for i in mine).mean_accepted_length,
        )
    return found


def _outputs(measured: Measured) -> Outputs:
    """Greedy answers compared. In bfloat16 near ties may fall either way; in float32 all but ties must agree."""
    drafted, own = [a.tokens for a in measured.drafted], [o.plain for o in measured.ours]
    plain = [a.tokens for a in measured.plain[0]] if measured.plain else None
    return Outputs(
        drafted_vs_plain=agreement(plain, drafted) if plain else None,
        plain_vs_ours=agreement(own, plain) if plain else None,
        drafted_vs_ours=agreement(own, drafted),
    )


def agreement(references: list[list[int]], others: list[list[int]]) -> Agreement:
    """Compare answers one by one."""
    places = [first_difference(a, b) for a, b in zip(references, others, strict=True)]
    differ = [place for place in places if place is not None]
    return Agreement(identical=len(places) - len(differ), prompts=len(places), first_differences=differ)


def _warnings(served: Served, outputs: Outputs, engine: str) -> list[str]:
    found = []
    speeds = [speed for speed in served.plain_runs if speed]
    if len(speeds) > 1 and max(speeds) > (1 + UNSTEADY) * min(speeds):
        found.append(
            f"plain decoding in {engine} ran at {min(speeds):.1f} and {max(speeds):.1f} tokens/s: other work on this "
            "machine makes the speed-up uncertain"
        )
    if served.drafts < FEW:
        found.append(f"only {served.drafts} verifications; more prompts narrow the interval")
    same = outputs.drafted_vs_plain
    if same and same.first_differences:
        found.append(
            f"{engine}'s drafted answers differ from its plain ones in {len(same.first_differences)} of "
            f"{same.prompts} prompts: rounding in bfloat16, or a fault; --dtype float32 tells"
        )
    return found


def _failures(there: Section, here: Section, ratio: float | None, engine: str) -> list[str]:
    if ratio is not None and ratio >= LEAST_RATIO:
        return []
    lengths = (side.mean_accepted_length or float("nan") for side in (there, here))
    served, own = lengths
    return [
        f"{engine} accepts {served:.2f} tokens a verification where our engine accepts {own:.2f} (ratio "
        f"{served / own:.2f}, at least {LEAST_RATIO} is asked for): check {CHECKS}"
    ]


def _sum(counts: Iterable[Counts]) -> Counts:
    return sum(counts, Counts())


def _pair(counts: Counts) -> tuple[int, int]:
    return counts.accepted + counts.drafts, counts.drafts
