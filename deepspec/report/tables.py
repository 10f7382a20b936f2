"""The rows behind every figure: what `dvc plots`, the report's charts and its PNGs all show.

A `way` is a way of decoding: a drafter as it is deployed, the same under another controller, or the lookup alone.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from typing import Any

from deepspec.evaluation.parts import Bounds, Positions, TaskEntry
from deepspec.evaluation.record import LOOKUP, Record
from deepspec.report.inputs import Inputs

Rows = list[dict[str, Any]]
COLUMNS = {  # figure → the columns of its CSV, the one that must be there first
    "training": ("loss", "drafter", "step", "lr"),
    "heldout": ("heldout_tau", "drafter", "step"),
    "speedup": ("tau", "way", "task", "temperature", "tau_low", "tau_high", "speedup", "low", "high"),
    "acceptance": ("accept_rate", "drafter", "task", "mode", "position", "blocks"),
    "output_position": ("tau", "drafter", "task", "temperature", "start", "rounds"),
    "contexts": ("tau", "drafter", "task", "temperature", "start", "end", "rounds"),
    "round_time": ("ms", "way", "temperature", "part"),
    "sweeps": ("tau", "drafter", "sweep", "value", "speedup", "low", "high"),
    "reliability": ("observed", "drafter", "mode", "when", "predicted", "count"),
    "thresholds": ("tokens", "drafter", "mode", "threshold", "outcome"),
    "throughput": (
        "tokens_per_second",
        "drafter",
        "temperature",
        "batch",
        "name",
        "speedup",
        "verified_per_request",
    ),
}


def tables(inputs: Inputs) -> dict[str, Rows]:
    """Return the rows of each figure, without those whose value was not measured."""
    found: dict[str, Rows] = {name: [] for name in COLUMNS}
    for name, log in inputs.training.items():
        found["training"] += [{"drafter": name, **line} for line in log]
        found["heldout"] += [{"drafter": name, **line} for line in log]
    several = len(inputs.records) > 1
    for name, record in inputs.records.items():
        found["speedup"] += _speedups(name, record, several)
        found["acceptance"] += _acceptance(name, record)
        found["output_position"] += [
            {"drafter": name, "task": task_of(key), "temperature": entry.temperature, **dict(row)}
            for key, entry in record.tasks.items()
            for row in entry.tau_by_output_position
        ]
        found["contexts"] += [
            {"drafter": name, "task": task_of(key), "temperature": record.tasks[key].temperature, **dict(row)}
            for key, bins in (record.contexts or {}).items()
            for row in bins
        ]
        found["round_time"] += _round_time(name, record, several)
        found["sweeps"] += [
            {"drafter": name, **dict(point), **_bounds(point.speedup_ci95)}
            for point in (record.sweeps.points if record.sweeps else [])
        ]
        for mode, quality in (record.confidence or {}).items():
            place = {"drafter": name, "mode": mode}
            found["reliability"] += [
                {**place, "when": when, **dict(row)} for when, rows in quality.reliability for row in rows
            ]
            found["thresholds"] += [
                {**place, "threshold": row.threshold, "outcome": outcome, "tokens": getattr(row, outcome)}
                for row in quality.thresholds
                for outcome in ("accepted", "rejected")
            ]
        found["throughput"] += [
            {"drafter": name, **dict(row), "speedup": row.speedup and row.speedup.value}
            for row in record.throughput or []
        ]
    return {
        figure: [row for row in rows if row.get(COLUMNS[figure][0]) is not None]
        for figure, rows in found.items()
    }


def ways(name: str, several: bool) -> dict[str | None, str]:
    """Return the names of a drafter's ways of decoding; None is the drafter as it is deployed."""
    return {None: name, LOOKUP: f"lookup beside {name}" if several else "lookup alone"}


def way_name(name: str, beside: str | None, several: bool) -> str:
    return ways(name, several).get(beside) or f"{name}, {beside}"


def task_of(key: str) -> str:
    """Return `humaneval` of `humaneval@T=0`."""
    return key.rsplit("@", 1)[0]


def to_csv(figure: str, rows: Iterable[dict]) -> str:
    first, *others = COLUMNS[figure]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*others, first], extrasaction="ignore", restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _speedups(name: str, record: Record, several: bool) -> Rows:
    rows = []
    for key, entry in record.tasks.items():
        for beside, figures in [(None, entry), *entry.beside.items()]:
            rows.append(
                {
                    "way": way_name(name, beside, several),
                    "task": task_of(key),
                    "temperature": entry.temperature,
                    "tau": figures.tau,
                    **_bounds(figures.tau_ci95, "tau_low", "tau_high"),
                    "speedup": figures.speedup,
                    **_bounds(figures.speedup_ci95),
                }
            )
    return rows


def _acceptance(name: str, record: Record) -> Rows:
    """Return the acceptance of the draft alone; a drafter that was not measured alone is shown as it is deployed."""
    entries: list[tuple[str, str, Positions | TaskEntry]]
    if record.blocks:
        entries = [
            (task, mode, entry) for mode, tasks in record.blocks.items() for task, entry in tasks.items()
        ]
    else:
        entries = [
            (task_of(key), "greedy" if entry.temperature == 0 else "sampled", entry)
            for key, entry in record.tasks.items()
        ]
    return [
        {"drafter": name, "task": task, "mode": mode, "position": k, "accept_rate": rate, "blocks": reached}
        for task, mode, entry in entries
        for k, (rate, reached) in enumerate(
            zip(entry.accept_rate_by_position, entry.reached_by_position, strict=True), start=1
        )
    ]


def _round_time(name: str, record: Record, several: bool) -> Rows:
    """Means over tasks of the medians."""
    sums: dict[tuple[str, float, str], list[float]] = {}
    for entry in record.tasks.values():
        for beside, figures in [(None, entry), *entry.beside.items()]:
            for part in ("draft", "verify", "host"):
                if (ms := getattr(figures, f"{part}_ms")) is not None:
                    key = (way_name(name, beside, several), entry.temperature, part)
                    sums.setdefault(key, []).append(ms)
    return [
        {"way": way, "temperature": temperature, "part": part, "ms": sum(values) / len(values)}
        for (way, temperature, part), values in sums.items()
    ]


def _bounds(interval: Bounds | None, low: str = "low", high: str = "high") -> dict[str, float | None]:
    return {low: interval and interval[0], high: interval and interval[1]}
