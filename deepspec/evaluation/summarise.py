"""Builds the evaluation record from what was measured prompt by prompt."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from statistics import fmean
from typing import TYPE_CHECKING, Any

from deepspec.decoding.cost import CostCurve
from deepspec.evaluation.contexts import tau_by_context
from deepspec.evaluation.parts import (
    BesideFigures,
    BesideMean,
    Blocks,
    Confidence,
    ContextBin,
    Decode,
    DraftProvenance,
    Figures,
    LosslessChecked,
    Mean,
    Mode,
    OutputBin,
    PassCosts,
    RecordWarning,
    RoundCosts,
    StateCosts,
    Summary,
    Sweeps,
    TaskEntry,
    Throughput,
    TrainParity,
)
from deepspec.evaluation.record import DRAFT, EVAL_VERSION, LOOKUP, Identity, Record, task_key
from deepspec.evaluation.runs import PLAIN, PromptRuns, Run, pair, tau_table
from deepspec.evaluation.stats import (
    Interval,
    bootstrap,
    macro_speedup,
    median_per_round_ms,
    quotient,
    speedup,
)

if TYPE_CHECKING:
    from deepspec.decoding.train_parity import Check
    from deepspec.tasks.task import Task

logger = logging.getLogger(__name__)

OUTPUT_BIN = 16  # tokens
_UNLIKE = 0.8  # of the held-out acceptance at position 1


@dataclass(frozen=True)
class Subject:
    """What was measured, on what."""

    drafter: str
    draft_digest: str
    target: str
    target_digest: str
    device: str
    dtype: str
    seed: int
    processes: int
    max_new_tokens: int  # an answer's, of every turn
    plain_new_tokens: int | None = None  # a plain one's, if it is cut
    engine: str | None = None  # a serving one


Results = Mapping[tuple[str, float], list[PromptRuns]]  # (task, temperature) → its prompts


@dataclass(frozen=True)
class Measured:
    """All that a record is made of.

    Args:
        contest: of the contestants `plain`, `draft`, `lookup` and other controllers of the same draft.
        identities: path ("draft", "lookup") → task → outcome. Other controllers verify less of what "draft" does.
        native: task → tokens/s of `transformers.generate`.
        promise: training's figures beside those of decoding.
    """

    contest: Results
    identities: Mapping[str, Mapping[str, Identity]]
    native: Mapping[str, float]
    decode: Decode
    provenance: DraftProvenance
    round_costs: RoundCosts | None = None
    blocks: dict[Mode, dict[str, Blocks]] | None = None
    confidence: dict[Mode, Confidence] | None = None
    throughput: list[Throughput] | None = None
    sweeps: Sweeps | None = None
    promise: Check | None = None


def build_record(subject: Subject, tasks: list[Task], measured: Measured) -> Record:
    """Build the whole record. An entry of T > 0 carries the verdict of its task's check, which is made at T = 0.

    A task that failed its check has no speed-up, and neither has a mean over it: both are null.
    """
    by_name = {task.name: task for task in tasks}
    seed = subject.seed
    entries = {
        task_key(name, temperature): _entry(by_name[name], temperature, rows, measured.identities, seed)
        for (name, temperature), rows in measured.contest.items()
    }
    summary = _summary(measured, entries, seed)
    parity = TrainParity(**asdict(measured.promise)) if measured.promise else None
    found = warnings(entries, summary, (measured.blocks or {}).get("greedy", {}), parity)
    for warning in found:
        logger.warning("%s: %s: %s", subject.drafter, warning.name, warning.message)
    return Record(
        eval_version=EVAL_VERSION,
        **asdict(subject),
        tasks=entries,
        summary=summary,
        blocks=measured.blocks,
        confidence=measured.confidence,
        throughput=measured.throughput,
        sweeps=measured.sweeps,
        promise={"greedy": parity} if parity else None,
        warnings=found,
        decode=measured.decode,
        round_costs=measured.round_costs,
        provenance=measured.provenance,
        states=state_costs(measured.contest),
        contexts=contexts(measured.contest),
        pass_costs=pass_costs(measured.contest, measured.round_costs),
    )


def accept_rates(rounds: Iterable[tuple[int, int]]) -> tuple[list[float], list[int]]:
    """Return the share accepted at each position k+1, and of how many rounds.

    Those are the rounds that proposed the position and accepted every earlier one. `rounds` are (accepted, drafted)
    tokens.
    """
    rounds = list(rounds)
    rates, counts = [], []
    for k in range(max((drafted for _, drafted in rounds), default=0)):
        reached = [accepted > k for accepted, drafted in rounds if drafted > k and accepted >= k]
        if not reached:
            break
        rates.append(sum(reached) / len(reached))
        counts.append(len(reached))
    return rates, counts


def tau_by_output_position(runs: Iterable[Run]) -> list[OutputBin]:
    """Return τ of the rounds that begin where so many tokens of the answer are there, by bins of `OUTPUT_BIN`."""
    bins: dict[int, list[int]] = {}
    for run in runs:
        for accepted in run.accepted:  # a turn
            starts = accumulate((count + 1 for count in accepted), initial=0)
            for start, count in zip(starts, accepted, strict=False):
                bins.setdefault(start // OUTPUT_BIN, []).append(count + 1)
    return [
        OutputBin(start=at * OUTPUT_BIN, end=(at + 1) * OUTPUT_BIN, rounds=len(found), tau=fmean(found))
        for at, found in sorted(bins.items())
    ]


def warnings(
    entries: Mapping[str, TaskEntry],
    summary: Summary,
    greedy_blocks: Mapping[str, Blocks],
    parity: TrainParity | None,
) -> list[RecordWarning]:
    """Return what a reader must not overlook, by name; nothing here changes a number."""
    found: list[RecordWarning] = []

    def warn(name: str, message: str) -> None:
        found.append(RecordWarning(name=name, message=message))

    broken = sorted({key.rsplit("@", 1)[0] for key, e in entries.items() if not e.lossless})
    if broken:
        warn(
            "not_lossless",
            f"the target's greedy output changed on {', '.join(broken)}; no speed-up is reported",
        )
    if parity and parity.below:
        warn(
            "below_training_promise",
            f"acceptance at position 1 is {parity.measured:.3f} in decoding and {parity.promised:.3f} in "
            f"training, on the same {parity.blocks} held-out contexts",
        )
    if parity and parity.unlike:
        shares = ", ".join(f"{share:.3f}" for share in parity.agreement)
        warn(
            "drafts_other_tokens",
            f"on the same {parity.blocks} held-out contexts decoding drafts other tokens than training did "
            f"(shares alike by position: {shares}): what decodes is not what was trained",
        )
    if parity and not parity.below and not parity.unlike:
        for task, entry in greedy_blocks.items():
            rate = entry.accept_rate_by_position[0] if entry.accept_rate_by_position else None
            if rate is not None and rate < _UNLIKE * parity.promised:
                warn(
                    "unlike_training_data",
                    f"on {task} acceptance at position 1 is {rate:.2f}, on held-out training data "
                    f"{parity.promised:.2f}: more prompts like these in the mix would help",
                )
    for temperature, mean in summary.by_temperature.items():
        if mean.speedup_ci95 and mean.speedup_ci95[1] < 1:
            warn("slower_than_plain", f"at T = {temperature} decoding with the draft is slower than without")
        lookup = mean.beside.get(LOOKUP)
        if lookup and lookup.ratio_ci95 and lookup.ratio_ci95[1] < 1:
            warn("weaker_than_lookup", f"at T = {temperature} the lookup alone, without training, is faster")
    return found


def _entry(
    task: Task,
    temperature: float,
    rows: list[PromptRuns],
    identities: Mapping[str, Mapping[str, Identity]],
    seed: int,
) -> TaskEntry:
    own = [row[DRAFT] for row in rows]
    identity = identities[DRAFT][task.name]
    beside = {}
    for name in rows[0]:
        if name not in (PLAIN, DRAFT):
            path = name if name in identities else DRAFT
            both = identity.lossless and identities[path][task.name].lossless
            ratio = speedup([pair(row[name], row[DRAFT]) for row in rows], seed) if both else None
            figures = _figures(rows, name, identities[path][task.name], seed)
            beside[name] = BesideFigures(
                **dict(figures), **_keys("ratio", ratio), computed=rows[0][name].computed
            )
    return TaskEntry(
        category=task.category,
        task_version=task.version,
        source=task.source,
        prompts_digest=task.digest,
        temperature=temperature,
        prompts=len(rows),
        new_tokens=sum(run.tokens for run in own),
        **dict(_figures(rows, DRAFT, identity, seed)),
        tau_by_output_position=tau_by_output_position(own),
        baseline_tokens_per_second=_rate([row[PLAIN] for row in rows]),
        ties=identity.ties,
        lossless_checked=LosslessChecked(prompts=identity.prompts, tokens=identity.tokens),
        output_hashes=[run.output for run in own],
        beside=beside,
    )


def pass_costs(results: Results, costs: RoundCosts | None) -> dict[str, PassCosts] | None:
    """Return what passes of the draft's rounds cost beside plain ones; None without a curve, or of runs of before."""
    if costs is None:
        return None
    curve, found = CostCurve.from_json(costs.model_dump()), {}
    for (name, temperature), rows in results.items():
        plain, drafted = ([row[which] for row in rows] for which in (PLAIN, DRAFT))
        of_rounds = curve.drawn() if temperature else curve
        by_curve, a_plain_one_by_curve = _seconds_by(of_rounds, drafted), _seconds_by(curve, plain)
        if by_curve and a_plain_one_by_curve:
            a_plain_one = sum(run.verify_s for run in plain) / len(a_plain_one_by_curve)
            found[task_key(name, temperature)] = PassCosts(
                by_curve=fmean(by_curve) / fmean(a_plain_one_by_curve),
                measured=sum(run.verify_s for run in drafted) / len(by_curve) / a_plain_one,
            )
    return found or None


def _seconds_by(curve: CostCurve, runs: Sequence[Run]) -> list[float]:
    """Return what the curve has for the pass of each round; none of runs of before."""
    found = []
    for run in runs:
        for i, counts in enumerate(run.verified):
            contexts = run.contexts[i] if run.contexts else []
            here = curve.at(fmean(contexts)) if contexts else curve
            found += [here.verify(1, 1 + count) for count in counts]
    return found


def state_costs(results: Results) -> dict[str, StateCosts] | None:
    """Return what the draft's rounds cost a target that keeps a state; None where nothing was run again."""
    found = {}
    for (name, temperature), rows in results.items():
        runs = [row[DRAFT] for row in rows]
        rounds = sum(run.rounds for run in runs)
        passes, fed = rounds + sum(run.extra_passes for run in runs), sum(run.fed for run in runs)
        if rounds and (fed or passes > rounds):
            committed = sum(run.committed for run in runs)
            found[task_key(name, temperature)] = StateCosts(
                passes=passes,
                fed_tokens=fed,
                fed_per_round=fed / rounds,
                tokens_per_pass=committed / passes,
            )
    return found or None


def contexts(results: Results) -> dict[str, list[ContextBin]] | None:
    """Return the draft's τ by context; None of runs that do not tell their prompts' lengths."""
    found = {
        task_key(name, temperature): tau_by_context(row[DRAFT] for row in rows)
        for (name, temperature), rows in results.items()
    }
    return found if any(found.values()) else None


def _figures(rows: list[PromptRuns], name: str, identity: Identity, seed: int) -> Figures:
    """Return what is said of every contestant."""
    runs = [row[name] for row in rows]
    rounds = [run.rounds for run in runs]
    rates, reached = accept_rates(
        pair
        for run in runs
        for turn in zip(run.accepted, run.drafted, strict=True)
        for pair in zip(*turn, strict=True)
    )
    gain = speedup([pair(row[PLAIN], row[name]) for row in rows], seed) if identity.lossless else None
    return Figures(
        rounds=sum(rounds),
        **_keys("tau", bootstrap([tau_table(runs)], quotient, seed)),
        accept_rate_by_position=rates,
        reached_by_position=reached,
        tokens_per_second=_rate(runs),
        **_keys("speedup", gain),
        draft_ms=median_per_round_ms([run.draft_s for run in runs], rounds),
        verify_ms=median_per_round_ms([run.verify_s for run in runs], rounds),
        host_ms=median_per_round_ms([run.host_s for run in runs], rounds),
        lossless=identity.lossless,
    )


def _summary(measured: Measured, entries: dict[str, TaskEntry], seed: int) -> Summary:
    """Return macro means over tasks. The headline is greedy decoding, or the lowest temperature measured."""
    temperatures = sorted({temperature for _, temperature in measured.contest})
    lossless = {
        path: all(i.lossless for i in by_task.values()) for path, by_task in measured.identities.items()
    }
    means = {f"{t:g}": _macro(measured.contest, t, lossless, seed) for t in temperatures}
    headline = temperatures[0]
    rates = {name: entries[task_key(name, headline)].tokens_per_second for name in measured.native}
    ratios = [rate / measured.native[name] for name, rate in rates.items() if rate]
    comparable = lossless[DRAFT] and headline == 0 and len(ratios) == len(rates)
    against_native = fmean(ratios) if ratios and comparable else None
    own = means[f"{headline:g}"]
    return Summary(
        temperature=headline,
        tau=own.tau,
        tau_ci95=own.tau_ci95,
        speedup=own.speedup,
        speedup_ci95=own.speedup_ci95,
        speedup_vs_hf=against_native,
        lossless=lossless[DRAFT],
        by_temperature=means,
    )


def _macro(contest: Results, temperature: float, lossless: Mapping[str, bool], seed: int) -> Mean:
    tasks = [rows for (_, t), rows in contest.items() if t == temperature]
    own: dict[str, Any] = {}
    beside = {}
    for name in tasks[0][0]:
        if name == PLAIN:
            continue
        sound = lossless[name if name in lossless else DRAFT]
        gain = macro_speedup([[pair(row[PLAIN], row[name]) for row in rows] for rows in tasks], seed)
        tau = bootstrap([tau_table(row[name] for row in rows) for rows in tasks], quotient, seed)
        figures = {**_keys("tau", tau), **_keys("speedup", gain if sound else None)}
        if name == DRAFT:
            own = figures
        else:
            ratio = macro_speedup([[pair(row[name], row[DRAFT]) for row in rows] for rows in tasks], seed)
            shown = ratio if sound and lossless[DRAFT] else None
            beside[name] = BesideMean(**figures, **_keys("ratio", shown))
    return Mean(**own, beside=beside)


def _keys(name: str, interval: Interval | None) -> dict:
    if interval is None:
        return {name: None, f"{name}_ci95": None}
    return {name: interval.value, f"{name}_ci95": interval.bounds}


def _rate(runs: list[Run]) -> float | None:
    seconds = sum(run.seconds for run in runs)
    return sum(run.tokens for run in runs) / seconds if seconds > 0 else None
