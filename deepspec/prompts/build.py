"""The training prompts: sources mixed by weight, filtered, and written with a manifest of what happened.

A source offers candidates in an order that depends on the seed alone; the sieve lets the good ones through
until the source has filled its share. What one source cannot supply, the others do.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from deepspec.errors import DeepSpecError
from deepspec.files import digest, write_json, write_text
from deepspec.messages.prompt import Chat
from deepspec.messages.sources import Candidate, Faults, JsonlSource, hub_candidates, preset_candidates
from deepspec.prompts.filters import Sieve
from deepspec.prompts.magpie import Magpie
from deepspec.prompts.overlap import Overlap
from deepspec.prompts.params import PromptsParams
from deepspec.prompts.seeds.seeds import iter_seeds
from deepspec.prompts.seeds.tools import iter_tools

if TYPE_CHECKING:
    from deepspec.decoding.served import Stream

TRIES_PER_PROMPT = 20
WORK_DIR = Path(".deepspec/prompts")  # outside the stage's outputs, which `dvc repro` deletes first


class Source(Protocol):
    """Offers candidates; each call goes on where the last one stopped."""

    def candidates(self, need: int, sieve: Sieve) -> Iterator[Candidate]: ...


@dataclass(frozen=True)
class PromptSet:
    """The rows (`deepspec.messages.prompt`) and the manifest beside them."""

    rows: list[dict[str, Any]]
    manifest: dict[str, Any]


class Listed:
    """A source whose prompts are there already."""

    def __init__(self, candidates: Iterable[Candidate]) -> None:
        self.faults = candidates.faults if isinstance(candidates, JsonlSource) else Faults()
        self._candidates = iter(candidates)

    def candidates(self, need: int, sieve: Sieve) -> Iterator[Candidate]:
        return self._candidates


def build_prompts(
    params: PromptsParams,
    seed: int,
    eval_texts: Iterable[str],
    *,
    target: Any = None,
    batch_size: int = 48,
    work_dir: Path = WORK_DIR,
    decode: Stream | None = None,
) -> PromptSet:
    """Mix, filter and shuffle the training prompts.

    Args:
        eval_texts: user turns of the evaluation prompts, which must not appear in training.
        target: needed where the mix has a positive weight of `magpie`.
        batch_size: attempts that magpie decodes at once.
        work_dir: where magpie keeps attempts between runs.
        decode: decodes them in the place of our own engine.

    Raises:
        DeepSpecError: a source cannot be read, or no prompt passes the filters.
    """
    weights = {name: weight for name, weight in params.mix.items() if weight > 0}

    def magpie() -> Magpie:
        return Magpie(target, params.magpie, seed, batch_size, work_dir, decode)

    sources = {name: _source(name, params, seed, magpie) for name in weights}
    sieve = Sieve(params, Overlap(eval_texts, params.overlap_ngram))
    rows, notes = _mix(sources, weights, params.count, sieve)
    unread = {name: source.faults for name, source in sources.items() if isinstance(source, Listed)}
    if not rows:
        why = sieve.rejected + sum((faults.counts for faults in unread.values()), Counter())
        raise DeepSpecError(
            f"no training prompt passed the filters of {', '.join(weights)} "
            f"(rejected: {_listed(why) or 'none, the sources are empty'}); "
            "change prompts.mix or its bounds"
        )
    random.Random(seed).shuffle(rows)
    requested = split_by_weight(params.count, weights)
    accepted = Counter(row["source"] for row in rows)
    found: dict[str, dict[str, Any]] = {
        name: {"requested": requested[name], "accepted": accepted[name]} for name in weights
    }
    for name, faults in unread.items():
        if faults.counts:
            found[name] |= {"rows": faults.rows, "unusable": faults.to_dict()}
            lost = sum(faults.counts.values())
            notes.append(f"{name}: {lost} of {faults.rows} rows cannot be used ({_listed(faults.counts)})")
    manifest = {
        "count": len(rows),
        "requested": params.count,
        "seed": seed,
        "overlap_ngram": params.overlap_ngram,
        "sources": found,
        "rejected": dict(sorted(sieve.rejected.items())),
        "notes": notes,
        "digest": digest(_jsonl(rows)),
    }
    if sieve.left_out:
        manifest["left_out"] = dict(sorted(sieve.left_out.items()))
    return PromptSet(rows, manifest)


def write_prompts(prompts: PromptSet, directory: str | Path) -> None:
    """Write `train.jsonl` and `manifest.json`."""
    write_text(Path(directory) / "train.jsonl", _jsonl(prompts.rows))
    write_json(Path(directory) / "manifest.json", prompts.manifest)


def split_by_weight(count: int, weights: Mapping[str, float]) -> dict[str, int]:
    """Divide `count` into whole shares in proportion to the weights (largest remainder)."""
    total = sum(weights.values())
    exact = {name: count * weight / total for name, weight in weights.items()}
    shares = {name: math.floor(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: shares[name] - exact[name])
    for name in by_remainder[: count - sum(shares.values())]:
        shares[name] += 1
    return shares


def _source(name: str, params: PromptsParams, seed: int, magpie: Callable[[], Magpie]) -> Source:
    if name == "magpie":
        return magpie()
    if name == "seed":
        return Listed(Candidate(Chat.of_turns(turns)) for turns in iter_seeds(seed))
    if name == "tools":
        tries = params.count * TRIES_PER_PROMPT  # they never end
        return Listed(Candidate(chat) for chat in islice(iter_tools(seed), tries))
    kind, _, place = name.partition(":")
    if kind == "hub":
        return Listed(hub_candidates(place, seed))
    if kind == "preset":
        return Listed(preset_candidates(place, seed, params.max_malformed_share))
    return Listed(JsonlSource(place, seed, params.max_malformed_share))


def _mix(
    sources: Mapping[str, Source], weights: Mapping[str, float], count: int, sieve: Sieve
) -> tuple[list[dict], list[str]]:
    """Take every source's share; a shortfall is shared among the sources that have more, until none has."""
    rows: list[dict] = []
    notes: list[str] = []
    left = dict(weights)
    while len(rows) < count and left:
        for name, share in split_by_weight(count - len(rows), left).items():
            taken = [_row(name, candidate) for candidate in _take(sources[name], share, sieve)]
            rows += taken
            if len(taken) < share:
                del left[name]
                notes.append(f"{name} ran out: {len(taken)} of the {share} prompts asked of it")
    if len(rows) < count:
        notes.append(f"only {len(rows)} of {count} prompts: every source ran out")
    return rows, notes


def _take(source: Source, share: int, sieve: Sieve) -> Iterator[Candidate]:
    taken = 0
    if share == 0:
        return
    for candidate in source.candidates(share, sieve):
        if sieve.admit(candidate):
            yield candidate
            taken += 1
            if taken == share:
                return


def _row(source: str, candidate: Candidate) -> dict[str, Any]:
    return {"id": candidate.chat.id(), "source": source, **candidate.chat.fields()}


def _jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items()))
