"""What more training buys: τ and speed-up of a draft against the hours that it was trained.

The draft is trained for each of some shares of `train.steps`, as a run of that length would be: with its own warm-up
and cosine, on all of the data set. The whole is the pipeline's own draft, where it is there. All of them then decode
the evaluation's prompts, as `evaluate.decode` says, one after the other beside plain decoding; intervals are paired by
prompt. Hours are of training steps alone: data, features and evaluation are the same for all.

Ctrl-C stops it, and the same command goes on: checkpoints of the training and every decoded prompt are kept. Tokens
are not compared in float32 here; the pipeline's evaluation proves the whole draft lossless.

    python -m benchmarks.hours --drafter dspark --shares 0.1 0.25 0.5 1
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import altair as alt

from benchmarks.common import REPORTS, WORK_DIR, command_line, work_key, write_report
from deepspec.config import Params, load_params
from deepspec.decoding.profiles import load_or_measure
from deepspec.drafters.checkpoint import draft_digest
from deepspec.drafters.deployment import Deployment
from deepspec.drafters.load import load_drafter
from deepspec.errors import DeepSpecError, nearest
from deepspec.evaluation.contest import Contest, DecodingConfig
from deepspec.evaluation.runs import PLAIN, PromptRuns, from_json, pair, tau_table, to_json
from deepspec.evaluation.stats import Interval, bootstrap, macro_speedup, quotient
from deepspec.files import digest, file_digest
from deepspec.journal import WorkLog
from deepspec.markdown import markdown_table
from deepspec.progress import Progress
from deepspec.report.drawing import HEIGHT, PALETTE, Figure
from deepspec.target.model import Target, load_target
from deepspec.tasks.dialogue import longest
from deepspec.tasks.task import load_task
from deepspec.training.paths import TrainingPaths
from deepspec.training.run import train

TARGET = Path("data/target")
DATA = Path("data/distill/manifest.json")  # with the digest of what is trained on
Runs = dict[tuple[str, float], list[PromptRuns]]  # (task, temperature) → its prompts


@dataclass(frozen=True)
class Trained:
    """A draft after so many steps: where it is, and what its training log says."""

    share: float
    steps: int
    draft: Path
    hours: float
    heldout: float

    @property
    def name(self) -> str:
        """Its name in a contest."""
        return f"{self.share:g}"


def trained(params: Params, name: str, share: float) -> Trained:
    """Return the draft of a share of the steps; train it, or go on with it, where it is not there yet.

    Raises:
        DeepSpecError: the training fails, or its log was written before hours were noted.
    """
    steps = max(round(share * params.train.steps), 1)
    if share == 1 and Path("data/drafts", name).is_dir():
        paths = TrainingPaths.of(name)
    else:
        changed = params.train.model_copy(update={"steps": steps})
        run = params.model_copy(update={"train": changed})
        decides = run.train, run.drafters[name], run.seed, file_digest(DATA)
        place = WORK_DIR / "hours" / digest(repr(decides)) / name
        paths = TrainingPaths(place, place.with_suffix(".jsonl"), place.with_suffix(".features.json"))
        if not paths.history.exists():
            train(run, name, TARGET, paths)
    lines = [json.loads(line) for line in paths.history.read_text().splitlines()]
    hours = max((line.get("hours", 0.0) for line in lines), default=0.0)
    if not hours:
        raise DeepSpecError(f"{paths.history}: notes no hours; train the draft again (dvc repro -s -f train)")
    heldout = max(line.get("heldout_tau", 0.0) for line in lines)
    return Trained(share, steps, paths.draft, hours, heldout)


def decode(drafts: list[Trained], params: Params, target: Target, log: WorkLog) -> Runs:
    """Let plain decoding and all drafts decode every prompt of the evaluation; what is in the log stands."""
    chosen = params.evaluate
    tasks = [load_task(task, chosen.prompts_per_task, params.seed, chosen.tasks_dir) for task in chosen.tasks]
    pieces = [
        (task, temperature, i)
        for temperature in chosen.temperatures
        for task in tasks
        for i in range(len(task.prompts))
    ]
    keys = [f"{task.name} T={temperature:g} {i}" for task, temperature, i in pieces]
    missing = [(key, *piece) for key, piece in zip(keys, pieces, strict=True) if log.get(key) is None]
    if missing:
        configs = [DecodingConfig(PLAIN)]
        for each in drafts:
            drafter = load_drafter(each.draft, target)
            curve = load_or_measure(target, drafter, batches=(1,), shape=chosen.decode.tree)
            used = Deployment.of(target, drafter, chosen.decode, curve)
            configs.append(DecodingConfig(each.name, used.drafter, used.tree, used.verify, used.controller))
        contest = Contest(target, configs, chosen.max_new_tokens, params.seed, chosen.plain_new_tokens)
        contest.warm_up(longest(chat for task in tasks for chat in task.prompts), chosen.temperatures)
        with Progress("decoding", len(pieces), len(pieces) - len(missing)) as progress:
            for key, task, temperature, i in missing:
                log.add(key, to_json(contest.prompt(task.name, task.prompts[i], temperature, i)))
                progress.advance()
    runs: Runs = {}
    for key, (task, temperature, _) in zip(keys, pieces, strict=True):
        runs.setdefault((task.name, temperature), []).append(from_json(log.get(key) or {}))
    return runs


def curve(drafts: list[Trained], runs: Runs, seed: int) -> list[dict[str, Any]]:
    """Return a row for each draft and temperature: hours, τ and speed-up, means over tasks with their intervals."""
    rows = []
    for temperature in sorted({temperature for _, temperature in runs}):
        tasks = [prompts for (_, t), prompts in runs.items() if t == temperature]
        for each in drafts:
            tau = bootstrap([tau_table(row[each.name] for row in task) for task in tasks], quotient, seed)
            gain = macro_speedup([[pair(row[PLAIN], row[each.name]) for row in task] for task in tasks], seed)
            rows.append(
                {
                    "share": each.share,
                    "steps": each.steps,
                    "hours": each.hours,
                    "heldout_tau": each.heldout,
                    "temperature": f"{temperature:g}",
                    **_bounded("tau", tau),
                    **_bounded("speedup", gain),
                }
            )
    return rows


def _bounded(name: str, interval: Interval | None) -> dict[str, float | None]:
    if interval is None:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"))
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}


def charts(rows: list[dict[str, Any]]) -> list[Figure]:
    """Draw τ and speed-up against hours, with intervals, a colour a temperature."""
    return [
        _chart(rows, "tau", "τ", "Tokens committed per pass of the target"),
        _chart(rows, "speedup", "speed-up", "Speed-up over plain decoding"),
    ]


def _chart(rows: list[dict[str, Any]], name: str, axis: str, title: str) -> Figure:
    base = alt.Chart(alt.Data(values=[row for row in rows if row[name] is not None])).encode(
        x=alt.X("hours:Q", title="hours of training", scale=alt.Scale(zero=True)),
        color=alt.Color("temperature:N", title="T", scale=alt.Scale(range=list(PALETTE))),
    )
    scale = alt.Scale(zero=False)
    line = base.mark_line(point=True).encode(y=alt.Y(f"{name}:Q", title=axis, scale=scale))
    interval = base.mark_rule().encode(y=alt.Y(f"{name}_low:Q", title=axis, scale=scale), y2=f"{name}_high:Q")
    words = f"{title}, means over tasks with their 95 % intervals."
    return Figure(
        f"hours-{name}", "training", title, words, alt.layer(line, interval).properties(height=HEIGHT)
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    heads = [
        "share of the steps",
        "steps",
        "hours",
        "expected τ, held out",
        "T",
        "τ (95 %)",
        "speed-up (95 %)",
    ]
    cells = [
        (
            f"{row['share']:g}",
            str(row["steps"]),
            f"{row['hours']:.2f}",
            f"{row['heldout_tau']:.3f}",
            row["temperature"],
            _cell(row, "tau"),
            _cell(row, "speedup"),
        )
        for row in rows
    ]
    return markdown_table(heads, cells, "nnnnnnn")


def _cell(row: dict[str, Any], name: str) -> str:
    if row[name] is None:
        return "–"
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{row[name]:.2f}" + ("" if low is None else f" ({low:.2f}–{high:.2f})")


def arguments() -> argparse.ArgumentParser:
    parser = command_line("hours", __doc__)
    add = parser.add_argument
    add("--params", default="params.yaml", help="what is trained and decoded (default: %(default)s)")
    add("--drafter", default="dspark", help="a name under `drafters` (default: %(default)s)")
    add("--shares", nargs="+", type=float, default=[0.1, 0.25, 0.5, 1.0], help="of train.steps, 0 to 1")
    add("--output", type=Path, default=REPORTS, help="folder of the report")
    return parser


def main(argv: list[str] | None = None) -> int:
    flags = arguments().parse_args(argv)
    try:
        params = load_params(flags.params)
        if flags.drafter not in params.drafters:
            raise DeepSpecError(f"unknown drafter {flags.drafter!r}{nearest(flags.drafter, params.drafters)}")
        if wrong := [share for share in flags.shares if not 0 < share <= 1]:
            raise DeepSpecError(f"--shares takes numbers above 0 and up to 1, found {wrong[0]:g}")
        drafts = [trained(params, flags.drafter, share) for share in sorted(set(flags.shares))]
        target = load_target(TARGET)
        settings = params.evaluate.model_dump(mode="json"), params.seed
        key = work_key(target, [], [draft_digest(each.draft) for each in drafts], *settings)
        log = WorkLog(WORK_DIR / f"hours-{key}.jsonl")
        rows = curve(drafts, decode(drafts, params, target, log), params.seed)
    except DeepSpecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    title = f"What more training buys: {flags.drafter}"
    figures = charts(rows)
    shown = "\n\n".join(f"![{figure.title}]({figure.name}.png)" for figure in figures)
    write_report(flags.output, "hours", title, f"{table(rows)}\n\n{shown}", {"rows": rows}, target)
    for figure in figures:
        (flags.output / f"{figure.name}.png").write_bytes(figure.png())
    log.remove()
    return 0


if __name__ == "__main__":
    sys.exit(main())
