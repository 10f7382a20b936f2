"""What the scripts of this folder share: the records of all seeds as arrays, and intervals over seeds and prompts.

τ of a drafter on a task is tokens over rounds of all its prompts, for each seed of training by itself; then the mean
over seeds. A domain is the mean of its tasks, "mean" that of all tasks. A ratio is between such means, as the paper's.
The rounds are expected ones (`expected.py`), or those of decoding.
An interval resamples prompts within each task, the same draws for every drafter: pairs stay pairs. Few seeds cannot be
resampled (two never leave what the two gave), and two of one drafter say next to nothing of a third (Student's factor
is 12.7). Training again moves every drafter by much the same share of its τ: that share is estimated from all of them
together (`Spread`) and added in square. With one seed there is none, and the interval is of the prompts alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student_t

from deepspec.errors import DeepSpecError
from deepspec.evaluation.record import DRAFT, Record
from deepspec.evaluation.runs import PromptRuns, tau_table
from deepspec.evaluation.stats import RESAMPLES, Interval, expanded
from deepspec.report import compare
from paper.params import PaperParams

DOMAINS = ("math", "code", "chat", "other")
MEAN = "mean"

Tables = dict[str, np.ndarray]  # task → tokens and rounds, [seeds, prompts, 2]


@dataclass(frozen=True)
class Draft:
    """One drafter trained with one seed: its record, and its runs by task and temperature."""

    record: Record
    runs: dict[tuple[str, float], list[PromptRuns]]

    @property
    def lossless(self) -> bool:
        return all(entry.lossless for entry in self.record.tasks.values())


@dataclass(frozen=True)
class Study:
    """
    Attributes:
        drafts: drafter of the table → in the order of the seeds.
        rounds: of reports/expected, drafter → task → prompts: those of each seed in their order, then the ablations'.
    """

    params: PaperParams
    drafts: dict[str, list[Draft]]
    rounds: list[dict[str, Any]]

    @property
    def tasks(self) -> dict[str, str]:
        """Task → category, in the order of `DOMAINS`."""
        record = next(iter(self.drafts.values()))[0].record
        found = {key.rsplit("@", 1)[0]: entry.category for key, entry in record.tasks.items()}
        return dict(sorted(found.items(), key=lambda item: DOMAINS.index(item[1])))

    @property
    def groups(self) -> dict[str, list[str]]:
        """Domain → its tasks, and "mean" → all."""
        domains = dict.fromkeys(self.tasks.values())
        return {d: [t for t, own in self.tasks.items() if own == d] for d in domains} | {MEAN: [*self.tasks]}

    def tables(self, name: str, length: int | None = None) -> Tables:
        """Expected rounds at T = 1 of blocks cut to `length` (None: whole ones), of the seeds there are; of an ablation
        too."""
        whole = self.params.drafters[name].block_size
        place = min(length or whole, whole) - 1
        return self.counts(name, lambda prompt: (prompt["tokens"], prompt["rounds"][place]))

    def counts(self, name: str, pair: Callable[[dict[str, Any]], tuple[float, float]]) -> Tables:
        """Two numbers of every prompt of the drafter's records."""
        own = [record[name] for record in self.rounds if name in record]
        return {task: np.array([[pair(p) for p in seed[task]] for seed in own], float) for task in self.tasks}

    def expected(self, length: int | None = None) -> Taus:
        """At T = 1, of blocks cut to `length`."""
        return Taus({name: self.tables(name, length) for name in self.drafts})

    def decoded(self, temperature: float) -> Taus:
        def runs(draft: Draft, task: str) -> np.ndarray:
            return tau_table(row[DRAFT] for row in draft.runs[task, temperature])

        return Taus(
            {
                name: {task: np.stack([runs(draft, task) for draft in own]) for task in self.tasks}
                for name, own in self.drafts.items()
            }
        )


@dataclass(frozen=True)
class Taus:
    """Intervals of τ, and of ratios of τ, from tables of one kind.

    Attributes:
        drafters: the table's, of all seeds: from them is taken what seeds differ by.
    """

    drafters: dict[str, Tables]

    @cached_property
    def bootstrap(self) -> Bootstrap:
        tables = next(iter(self.drafters.values()))
        return Bootstrap({task: table.shape[1] for task, table in tables.items()})

    def tau(self, own: Tables, tasks: list[str]) -> Interval:
        """Mean over tasks and seeds."""
        values, spread = self.bootstrap.quotient(own, tasks), Spread.of(self.drafters.values(), tasks)
        return self.bootstrap.interval(values, tasks, spread.half(float(values[0]), _seeds(own)))

    def ratio(self, above: Tables, below: Tables, tasks: list[str]) -> Interval:
        """Of two mean τ, of as many seeds."""
        values = self.bootstrap.quotient(above, tasks) / self.bootstrap.quotient(below, tasks)
        spread = Spread.of(self.drafters.values(), tasks)
        return self.bootstrap.interval(
            values, tasks, spread.half(float(values[0]), _seeds(above), drafters=2)
        )


def _seeds(tables: Tables) -> int:
    return len(next(iter(tables.values())))


@dataclass(frozen=True)
class Spread:
    """By which share of τ drafts of different seeds are apart: the standard deviation of log τ, over all drafters."""

    share: float
    freedom: int  # degrees, over all drafters

    @classmethod
    def of(cls, drafters: Iterable[Tables], tasks: list[str]) -> Spread:
        logs = np.log([by_seed(tables, tasks) for tables in drafters])  # [drafters, seeds]
        freedom = logs.shape[0] * (logs.shape[1] - 1)
        squares = ((logs - logs.mean(1, keepdims=True)) ** 2).sum()
        return cls(float(squares / max(freedom, 1)) ** 0.5, freedom)

    def half(self, value: float, seeds: int, drafters: int = 1) -> float:
        """Half of the 95 % interval that the seeds alone would give `value`, a mean τ or the ratio of two drafters'."""
        if not self.freedom:
            return 0.0
        return float(value * self.share * student_t.ppf(0.975, self.freedom) * (drafters / seeds) ** 0.5)


class Bootstrap:
    """Draws of prompts as weights; row 0 is what was measured.

    Args:
        prompts: task → number of prompts.
    """

    def __init__(self, prompts: Mapping[str, int]):
        rng = np.random.default_rng(0)
        self.prompts = {task: _weights(rng, count) for task, count in prompts.items()}

    def quotient(self, tables: Tables, tasks: list[str]) -> np.ndarray:
        """The first number over the second, each summed over prompts: mean over tasks and seeds, [1 + RESAMPLES]."""
        return np.mean([self._quotient(tables[task], self.prompts[task]) for task in tasks], axis=0)

    def _quotient(self, table: np.ndarray, prompts: np.ndarray) -> np.ndarray:
        above, below = np.moveaxis(np.einsum("rp,spc->rsc", prompts, table), -1, 0)
        return (above / below).mean(1)

    def interval(self, values: np.ndarray, tasks: list[str], seeds: float) -> Interval:
        """Of [1 + RESAMPLES] values made of these tasks, expanded for the number of prompts as the records' are.

        Args:
            seeds: half of the interval that the seeds alone would give (`Spread.half`).
        """
        value, prompts = float(values[0]), [self.prompts[task].shape[1] for task in tasks]
        if min(prompts) < 2:  # which says nothing of others
            return Interval(value, None, None)
        own = expanded(value, values[1:], sum(prompts), len(tasks))
        return Interval(
            value,
            value - float(np.hypot(value - own.low, seeds)),
            value + float(np.hypot(own.high - value, seeds)),
        )


def by_seed(tables: Tables, tasks: list[str]) -> np.ndarray:
    """Mean τ over tasks of each seed, [seeds]."""
    sums = [tables[task].sum(1) for task in tasks]
    return np.mean([s[:, 0] / s[:, 1] for s in sums], axis=0)


def load(params: PaperParams, root: Path = Path(".")) -> Study:
    """Read reports/eval/seed-<n>/ of every seed, and reports/expected/.

    Raises:
        DeepSpecError: params without a study, or records that are missing or cannot be compared.
    """
    study = params.study
    seeds = study.seeds
    drafts = {
        name: [_draft(root / f"reports/eval/seed-{s}" / name) for s in seeds] for name in params.pipeline
    }
    records = [draft.record for own in drafts.values() for draft in own]
    for record in records:
        for key in ("eval_version", "target_digest", "dtype", "seed", "max_new_tokens"):
            if getattr(record, key) != getattr(records[0], key):
                one, other = getattr(record, key), getattr(records[0], key)
                raise DeepSpecError(f"records of different {key}: {one} and {other}; run dvc repro")
        prompts = [entry.prompts_digest for entry in record.tasks.values()]
        if prompts != [entry.prompts_digest for entry in records[0].tasks.values()]:
            raise DeepSpecError("records of different prompts; run dvc repro")
    names = [f"seed-{seed}" for seed in seeds] + [f"ablation-{name}" for name in study.ablations]
    return Study(params, drafts, [_rounds(root / f"reports/expected/{name}.json") for name in names])


def _draft(path: Path) -> Draft:
    measured = compare.load(path.with_name(f"{path.name}.json"))
    measured.record.require_version(measured.path)
    return Draft(measured.record, measured.prompts)


def _rounds(file: Path) -> dict[str, Any]:
    if not file.exists():
        raise DeepSpecError(f"{file} is missing; run dvc repro")
    return json.loads(file.read_text())["drafters"]


def _weights(rng: np.random.Generator, count: int) -> np.ndarray:
    """How often each of `count` things is drawn, [1 + RESAMPLES, count]; once each in row 0."""
    drawn = rng.multinomial(count, np.full(count, 1 / count), RESAMPLES)
    return np.concatenate((np.ones((1, count)), drawn))
