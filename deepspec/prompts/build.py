"""The training prompts: sources mixed by weight, filtered, and written with a manifest of what happened.

A source offers candidates in an order that depends on the seed alone; the sieve lets the good ones through
until the source has filled its share. What one source cannot supply, the others do. Candidates are read and judged by
all cores, a few thousand ahead; what was let through lies on the disk.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from deepspec.errors import DeepSpecError
from deepspec.files import replacing, write_json
from deepspec.messages.prompt import Chat
from deepspec.messages.sources import Candidate, Given, JsonlSource, Listing, hub_source, preset_source
from deepspec.parallel import in_pieces, ordered_map
from deepspec.progress import Progress
from deepspec.prompts.filters import Judged, Sieve
from deepspec.prompts.magpie import Magpie
from deepspec.prompts.overlap import Overlap
from deepspec.prompts.params import PromptsParams
from deepspec.prompts.rows import Rows
from deepspec.prompts.seeds.seeds import iter_seeds
from deepspec.prompts.seeds.tools import iter_tools

if TYPE_CHECKING:
    from deepspec.decoding.served import Stream

TRIES_PER_PROMPT = 20
QUIET = 20_000  # prompts that are made without a display
PIECE = 512  # candidates that a process judges at once
WORK_DIR = Path(".deepspec/prompts")  # outside the stage's outputs, which `dvc repro` deletes first


class Source(Protocol):
    """Offers judged candidates; each call goes on where the last one stopped."""

    def offers(self, need: int, sieve: Sieve) -> Iterator[Judged]: ...


@dataclass(frozen=True)
class PromptSet:
    """The rows (`deepspec.messages.prompt`) and the manifest beside them."""

    rows: Rows
    manifest: dict[str, Any]


class Listed:
    """A source whose prompts are there already."""

    def __init__(self, name: str, listing: Listing) -> None:
        self.name, self.listing = name, listing
        self._judged: Iterator[Judged] | None = None

    def offers(self, need: int, sieve: Sieve) -> Iterator[Judged]:
        if self._judged is None:
            pieces = in_pieces(self.listing.raws(), PIECE)
            self._judged = chain.from_iterable(ordered_map(partial(self._judge, sieve), pieces))
        return self._judged

    def _judge(self, sieve: Sieve, raws: list[Any]) -> list[Judged]:
        return [sieve.judge(self.name, self.listing.read(raw)) for raw in raws]


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
        work_dir: where magpie keeps attempts between runs, and prompts lie until they are written.
        decode: decodes magpie's attempts in the place of our own engine.

    Raises:
        DeepSpecError: a source cannot be read, or no prompt passes the filters.
    """
    weights = {name: weight for name, weight in params.mix.items() if weight > 0}

    def magpie() -> Magpie:
        return Magpie(target, params.magpie, seed, batch_size, work_dir, decode)

    sources = {name: _source(name, params, seed, magpie) for name in weights}
    sieve = Sieve(params, Overlap(eval_texts, params.overlap_ngram))
    rows = Rows(work_dir)
    accepted, notes = _mix(sources, weights, params.count, sieve, rows)
    unread = {name: source.listing.faults for name, source in sources.items() if isinstance(source, Listed)}
    if not rows:
        why = sieve.rejected + sum((faults.counts for faults in unread.values()), Counter())
        raise DeepSpecError(
            f"no training prompt passed the filters of {', '.join(weights)} "
            f"(rejected: {_listed(why) or 'none, the sources are empty'}); "
            "change prompts.mix or its bounds"
        )
    rows.shuffle(seed)
    requested = split_by_weight(params.count, weights)
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
        "digest": rows.digest(),
    }
    if sieve.left_out:
        manifest["left_out"] = dict(sorted(sieve.left_out.items()))
    return PromptSet(rows, manifest)


def write_prompts(prompts: PromptSet, directory: str | Path) -> None:
    """Write `train.jsonl` and `manifest.json`."""
    with replacing(Path(directory) / "train.jsonl") as scratch, scratch.open("wb") as file:
        file.writelines(prompts.rows.lines())
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
    return Listed(name, _listing(name, params, seed))


def _listing(name: str, params: PromptsParams, seed: int) -> Listing:
    if name == "seed":
        return Given(Candidate(Chat.of_turns(turns)) for turns in iter_seeds(seed))
    if name == "tools":
        tries = params.count * TRIES_PER_PROMPT  # they never end
        return Given(Candidate(chat) for chat in islice(iter_tools(seed), tries))
    kind, _, place = name.partition(":")
    if kind == "hub":
        return hub_source(place, seed)
    if kind == "preset":
        return preset_source(place, seed, params.max_malformed_share)
    return JsonlSource(place, seed, params.max_malformed_share)


def _mix(
    sources: Mapping[str, Source], weights: Mapping[str, float], count: int, sieve: Sieve, rows: Rows
) -> tuple[Counter[str], list[str]]:
    """Take every source's share; a shortfall is shared among the sources that have more, until none has."""
    accepted: Counter[str] = Counter()
    notes: list[str] = []
    left = dict(weights)
    shown = count > QUIET and "magpie" not in sources  # which shows its own
    with Progress("prompts", count, shown=shown) as progress:
        while len(rows) < count and left:
            for name, share in split_by_weight(count - len(rows), left).items():
                taken = _take(sources[name], share, sieve, rows, progress)
                accepted[name] += taken
                if taken < share:
                    del left[name]
                    notes.append(f"{name} ran out: {taken} of the {share} prompts asked of it")
    if len(rows) < count:
        notes.append(f"only {len(rows)} of {count} prompts: every source ran out")
    return accepted, notes


def _take(source: Source, share: int, sieve: Sieve, rows: Rows, progress: Progress) -> int:
    """Keep up to `share` prompts of a source and return how many it had."""
    taken = 0
    if share == 0:
        return taken
    for judged in source.offers(share, sieve):
        if sieve.admit(judged):
            rows.append(judged.line)
            progress.advance()
            taken += 1
            if taken == share:
                break
    return taken


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items()))
