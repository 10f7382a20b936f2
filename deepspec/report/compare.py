"""Two records side by side, paired prompt by prompt, and the verdict that the promotion gate relies on.

A ratio is B over A on the same prompts: of speed-ups, each over the plain run beside it, so that a slower machine or
hour takes nothing from either; and of τ. Prompts are resampled as pairs. B is *worse* where the mean over tasks of a
ratio is below 1 − margin, or where B changed a token, whatever A did; `proof` asks for more: the whole 95 % interval
above 1 − margin.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deepspec.errors import DeepSpecError
from deepspec.evaluation.record import DRAFT, EVAL_VERSION, Record, task_key
from deepspec.evaluation.runs import PLAIN, PromptRuns, from_json, pair, tau_table
from deepspec.evaluation.stats import Interval, against, bootstrap, pair_table, quotient, speed_ratio

MARGIN = 0.03
_SAME = ("eval_version", "target_digest", "dtype", "seed", "max_new_tokens")
EVAL_DIR = Path("reports/eval")
FIGURES = {"speedup": speed_ratio, "tau": quotient}


@dataclass(frozen=True)
class Measurements:
    """A record with its prompts: (task, temperature) → the runs of each."""

    path: Path
    record: Record
    prompts: dict[tuple[str, float], list[PromptRuns]]


@dataclass(frozen=True)
class Line:
    """One figure of one task (None: the mean over tasks) at one temperature."""

    task: str | None
    temperature: float
    figure: str  # "speedup" or "tau"
    first: float | None
    second: float | None
    ratio: Interval | None

    def worse(self, margin: float, proof: bool = False) -> bool:
        """Check whether B is worse; False if the ratio is undefined (a run was not lossless) or of one prompt."""
        if self.ratio is None:
            return False
        reached = self.ratio.low if proof else self.ratio.value
        return reached is None or reached < 1 - margin


@dataclass(frozen=True)
class Comparison:
    lines: list[Line]
    failures: list[str]  # why B is worse; empty: it is not
    notes: list[str]  # what makes the comparison weaker than it looks


def load(name_or_path: str | Path) -> Measurements:
    """Load a record by its drafter's name or its file, with the `.prompts.jsonl` beside it.

    Raises:
        DeepSpecError: one of the two files is missing, something else, or of another run.
    """
    path = Path(name_or_path)
    if path.suffix != ".json":
        path = EVAL_DIR / f"{name_or_path}.json"
    prompts_path = path.with_suffix(".prompts.jsonl")
    for file in (path, prompts_path):
        if not file.is_file():
            raise DeepSpecError(
                f"{file}: no such file; evaluate the drafter (deepspec evaluate --drafter NAME)"
            )
    prompts: dict[tuple[str, float], list[PromptRuns]] = {}
    record = Record.read(path)
    try:
        for text in prompts_path.read_text().splitlines():
            line = json.loads(text)
            prompts.setdefault((line["task"], line["temperature"]), []).append(from_json(line["runs"]))
    except (ValueError, KeyError, TypeError) as error:
        raise DeepSpecError(
            f"{prompts_path}: not the prompts of an evaluation record ({error!r}); evaluate the drafter again"
        ) from None
    written = {key: entry.output_hashes for key, entry in record.tasks.items()}
    if written != {task_key(*key): [row[DRAFT].output for row in rows] for key, rows in prompts.items()}:
        raise DeepSpecError(
            f"{prompts_path}: not of the run that wrote {path.name}; evaluate the drafter again"
        )
    return Measurements(path, record, prompts)


def compare(
    first: Measurements, second: Measurements, margin: float = MARGIN, proof: bool = False
) -> Comparison:
    """Compare B (`second`) with A (`first`).

    Raises:
        DeepSpecError: they cannot be compared: another target, precision, seed, answer length or other prompts.
    """
    keys = _common(first, second)
    lines = list(_lines(first, second, keys))
    failures = [
        f"{line.figure} at T = {line.temperature:g} is {line.ratio} of A's; at least {1 - margin:.3f} is asked for"
        for line in lines
        if line.task is None and line.worse(margin, proof)
    ]
    if not second.record.summary.lossless:
        failures.insert(0, "B changes the target's greedy output")
    notes = []
    if first.record.device != second.record.device:
        notes.append(f"measured on different devices: {first.record.device}; {second.record.device}")
    if first.record.processes != second.record.processes:
        notes.append("measured by different numbers of processes, which share a machine's speed")
    if left := sorted(set(first.record.tasks) ^ set(second.record.tasks)):
        notes.append(f"only in one of them: {', '.join(left)}")
    return Comparison(lines, failures, notes)


def _common(first: Measurements, second: Measurements) -> list[tuple[str, float]]:
    for name in _SAME:
        one, other = getattr(first.record, name), getattr(second.record, name)
        if one != other:
            raise DeepSpecError(f"the records cannot be compared: {name} is {one} in A and {other} in B")
    if (version := first.record.eval_version) != EVAL_VERSION:
        raise DeepSpecError(
            f"the records are of evaluation version {version}, not {EVAL_VERSION}; evaluate again"
        )
    keys = [key for key in first.prompts if key in second.prompts]
    if not keys:
        raise DeepSpecError("the records cannot be compared: they have no task and temperature in common")
    for task, temperature in keys:
        entry = task_key(task, temperature)
        one, other = (each.record.tasks[entry].prompts_digest for each in (first, second))
        if one != other:
            raise DeepSpecError(f"the records cannot be compared: {task} has other prompts in A than in B")
    return keys


def _lines(first: Measurements, second: Measurements, keys: list[tuple[str, float]]) -> Iterator[Line]:
    seed = first.record.seed
    lossless = first.record.summary.lossless and second.record.summary.lossless
    for temperature in sorted({temperature for _, temperature in keys}):
        tasks = [task for task, t in keys if t == temperature]
        tables = {
            task: compare_tables(*(m.prompts[task, temperature] for m in (first, second))) for task in tasks
        }
        for figure, statistic in FIGURES.items():
            for task in [*tasks, None]:
                chosen = [tables[name][figure] for name in (tasks if task is None else [task])]
                unproven = figure == "speedup" and not lossless
                a, b = (_value(m, chosen, half, figure) for half, m in enumerate((first, second)))
                ratio = None if unproven else bootstrap(chosen, against(statistic), seed)
                yield Line(task, temperature, figure, a, b, ratio)


def compare_tables(first: list[PromptRuns], second: list[PromptRuns]) -> dict[str, np.ndarray]:
    """Return for each of `FIGURES` the columns of the first, then of the second, on the same prompts."""
    pairs = [pair_table([pair(row[PLAIN], row[DRAFT]) for row in rows]) for rows in (first, second)]
    taus = [tau_table(row[DRAFT] for row in rows) for rows in (first, second)]
    return {"speedup": np.concatenate(pairs, axis=1), "tau": np.concatenate(taus, axis=1)}


def _value(measured: Measurements, tables: list[np.ndarray], half: int, figure: str) -> float | None:
    """Return the figure of A (half 0) or B (half 1), from the same prompts as the ratio."""
    if figure == "speedup" and not measured.record.summary.lossless:
        return None
    found = bootstrap([np.split(table, 2, axis=1)[half] for table in tables], FIGURES[figure])
    return None if found is None else found.value


def show(comparison: Comparison, first: Measurements, second: Measurements) -> None:
    """Print the table, the notes and the verdict."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    names = [f"{letter}: {m.path}" for letter, m in (("A", first), ("B", second))]
    grid = Table(title="B against A, paired by prompt", caption="   ".join(names))
    for i, column in enumerate(("T", "figure", "task", "A", "B", "B / A (95 %)")):
        grid.add_column(column, justify="right" if i >= 3 else "left")
    for line in comparison.lines:
        figure = {"speedup": "speed-up", "tau": "τ"}[line.figure]
        values = ["–" if value is None else f"{value:.3f}" for value in (line.first, line.second)]
        cells = [
            f"{line.temperature:g}",
            figure,
            line.task or "mean of tasks",
            *values,
            str(line.ratio or "–"),
        ]
        grid.add_row(*cells, style=None if line.task else "bold", end_section=line.task is None)
    console.print(grid)
    for note in comparison.notes:
        console.print(f"note: {note}", highlight=False)
    for failure in comparison.failures:
        console.print(f"worse: {failure}", highlight=False)
    if not comparison.failures:
        console.print("B is not worse than A", highlight=False)
