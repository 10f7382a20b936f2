"""The gate: what a challenger must show before it is the champion. Pure; each rule is a function of the evidence.

A rule of the first list stands for itself. One of the second says whether the two can be compared at all, one of the
third compares them, by the rule of `deepspec compare`. Without a champion there is nothing to compare with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from deepspec.evaluation.record import Record
from deepspec.report.compare import Comparison, Measurements, compare
from deepspec.tracking.params import PromoteParams


@dataclass(frozen=True)
class Evidence:
    """What a registered version brings along."""

    version: str
    draft_digest: str
    measured: Measurements
    export: dict[str, Any] | None = None

    @property
    def record(self) -> Record:
        return self.measured.record


@dataclass(frozen=True)
class Verdict:
    """Of one rule; `passed` is None where it was not asked."""

    rule: str
    passed: bool | None
    found: str


Rule = Callable[[Evidence, PromoteParams], tuple[bool, str]]
PairRule = Callable[[Evidence, Evidence], tuple[bool, str]]


def evidence_of_this_draft(challenger: Evidence, params: PromoteParams) -> tuple[bool, str]:
    found = {challenger.record.draft_digest}
    if challenger.export and params.require_export:
        found.add(challenger.export["draft_digest"])
    return found == {challenger.draft_digest}, f"draft {challenger.draft_digest}, evidence of {_names(found)}"


def lossless(challenger: Evidence, params: PromoteParams) -> tuple[bool, str]:
    tasks = challenger.record.tasks
    broken = sorted(name for name, entry in tasks.items() if not entry.lossless)
    if broken:
        return False, f"the greedy output changed on {_names(broken)}"
    return challenger.record.summary.lossless, f"the target's own greedy output on {len(tasks)} entries"


def fast_enough(challenger: Evidence, params: PromoteParams) -> tuple[bool, str]:
    gain = challenger.record.summary.speedup
    found = "none" if gain is None else f"{gain:.3f}"
    return gain is not None and gain >= params.min_speedup, f"{found}; at least {params.min_speedup:g}"


def export_passed(challenger: Evidence, params: PromoteParams) -> tuple[bool, str]:
    if not params.require_export:
        return True, "not asked for (promote.require_export)"
    if challenger.export is None:
        return False, "there is none: run `dvc repro`, then register again"
    engines = challenger.export["engines"]
    written = {name: engine["parity"]["passed"] for name, engine in engines.items() if "parity" in engine}
    failed = sorted(name for name, passed in written.items() if not passed)
    if failed:
        return False, f"parity failed for {_names(failed)}"
    return bool(
        challenger.export["passed"] and written
    ), f"parity passed for {_names(written) or 'no engine'}"


def same_eval_version(champion: Evidence, challenger: Evidence) -> tuple[bool, str]:
    return _same(champion.record.eval_version, challenger.record.eval_version)


def same_target(champion: Evidence, challenger: Evidence) -> tuple[bool, str]:
    keys = ("target_digest", "dtype", "seed", "max_new_tokens", "engine")

    def facts(record: Record) -> str:
        values = {key: getattr(record, key) for key in keys}
        return ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)

    return _same(facts(champion.record), facts(challenger.record))


def same_device_class(champion: Evidence, challenger: Evidence) -> tuple[bool, str]:
    return _same(device_class(champion.record.device), device_class(challenger.record.device))


def same_tasks(champion: Evidence, challenger: Evidence) -> tuple[bool, str]:
    """Tasks, temperatures and prompts."""
    one, other = (
        {(name, entry.prompts_digest) for name, entry in each.record.tasks.items()}
        for each in (champion, challenger)
    )
    differing = {name for name, _ in one ^ other}
    return (
        not differing,
        f"they differ on {_names(differing)}" if differing else f"the same {len(one)} entries",
    )


RULES: tuple[Rule, ...] = (evidence_of_this_draft, lossless, fast_enough, export_passed)
COMPARABLE: tuple[PairRule, ...] = (same_eval_version, same_target, same_device_class, same_tasks)
FIGURES = {"tau": "tau_not_worse", "speedup": "speedup_not_worse"}


def judge(
    challenger: Evidence, champion: Evidence | None, params: PromoteParams, afresh: bool = False
) -> list[Verdict]:
    """Return every rule's verdict, in order.

    Args:
        afresh: let a champion that cannot be compared with go without comparison. One that can be is compared
            with all the same.
    """
    verdicts = [Verdict(rule.__name__, *rule(challenger, params)) for rule in RULES]
    if champion is None:
        names = [*(rule.__name__ for rule in COMPARABLE), *FIGURES.values()]
        return verdicts + [Verdict(name, None, "there is no champion yet") for name in names]
    pairs = [Verdict(rule.__name__, *rule(champion, challenger)) for rule in COMPARABLE]
    if all(verdict.passed for verdict in pairs):
        found = compare(champion.measured, challenger.measured, params.margin, params.proof)
        return verdicts + pairs + [_figure(found, figure, params) for figure in FIGURES]
    if afresh:
        pairs = [Verdict(v.rule, v.passed or None, v.found) for v in pairs]
    return verdicts + pairs + [Verdict(name, None, "they cannot be compared") for name in FIGURES.values()]


def passes(verdicts: list[Verdict]) -> bool:
    return all(verdict.passed is not False for verdict in verdicts)


def device_class(device: str) -> str:
    """Return what a speed-up depends on.

    `AMD EPYC 9B14, 2 threads, Linux, torch 2.13.0` → `AMD EPYC 9B14, 2 threads`.


    Threads belong to it, since they decide what a pass over several tokens costs; versions of software do not.
    """
    software = ("torch ", "CUDA ", "Linux", "Darwin", "Windows")
    return ", ".join(part for part in device.split(", ") if not part.startswith(software))


def _figure(found: Comparison, figure: str, params: PromoteParams) -> Verdict:
    """Means over tasks at each temperature; a speed-up that cannot be had fails."""
    lines = [line for line in found.lines if line.task is None and line.figure == figure]
    said = [f"T={line.temperature:g} {line.ratio or 'none'}" for line in lines]
    passed = not any(line.ratio is None or line.worse(params.margin, params.proof) for line in lines)
    bound = f"at least {1 - params.margin:g}" + (", interval and all" if params.proof else "")
    return Verdict(FIGURES[figure], passed, f"{'; '.join(said)} of the champion's; {bound}")


def _same(one: object, other: object) -> tuple[bool, str]:
    return one == other, str(one) if one == other else f"{one} of the champion, {other} of the challenger"


def _names(names: Any) -> str:
    return ", ".join(sorted(names))
