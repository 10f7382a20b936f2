"""A data set of many conversations from a prompt file to the first steps: peak memory and rows a second.

Four parts, each a process of its own: `prompts` are made of a file with 1 % of bad rows of twenty kinds; `merge` makes
a data set of shards of answers; `validation` judges the data set; `training` reads it (anew, and again as a second
drafter does), counts the draft vocabulary and makes the first batches. What target and draft compute is left out.

Beside another checkout both take turns, who comes first changes, and a ratio is of one turn; both must find the same
vocabulary and the same batches to the byte. What was measured is kept: a killed benchmark goes on, and `--parts` may
name some now and others later.

    git worktree add ../before 17885f3
    python -m benchmarks.scale --rows 20000 --turns 2 --beside ../before
    python -m benchmarks.scale --rows 1000000
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.common import REPORTS, WORK_DIR, command_line, write_report
from benchmarks.scale_data import write_data
from benchmarks.scale_side import PARTS, SAMPLE
from deepspec.errors import DeepSpecError
from deepspec.files import digest
from deepspec.git import git_or_none
from deepspec.journal import WorkLog
from deepspec.lineage import code_digest
from deepspec.markdown import markdown_table

ROOT = Path(__file__).parents[1]
HERE, BEFORE = "here", "before"
CODE = {  # that each part measures
    "prompts": ("deepspec.prompts.build",),
    "merge": ("deepspec.answers.shards",),
    "validation": ("deepspec.guard.suite",),
    "training": ("deepspec.features.read", "deepspec.drafters.start", "deepspec.training.batches"),
}
ALIKE = ("training",)  # parts whose result must be the same on both sides
ONLY_HERE = ("prompts", "merge")  # a bad row ended the run before, and shards had another form
WARM = ("read again", "vocabulary", "sampler", "first batch")  # what a start with the file there goes through
Found = dict[str, dict[str, list[dict[str, Any]]]]  # part → side → what was found, one a turn


def measure(checkout: Path, part: str, data: Path, length: int, steps: int) -> dict[str, Any]:
    """What `benchmarks.scale_side` finds in a fresh process over a checkout.

    Raises:
        DeepSpecError: it failed.
    """
    side = [str(Path(__file__).with_name("scale_side.py")), part, str(data), str(length), str(steps)]
    ran = subprocess.run(
        [
            sys.executable,
            "-P",
            *side,
        ],  # without this folder, whose `kernels` transformers would take for a package
        cwd=data.parent,
        env=os.environ | {"PYTHONPATH": str(checkout.resolve())},
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode:
        last = ran.stderr.strip().splitlines()[-1:] or [f"exit status {ran.returncode}"]
        raise DeepSpecError(f"{part} of {checkout}: {last[0]}")
    return json.loads(ran.stdout.strip().splitlines()[-1])


def collect(
    sides: dict[str, Path], parts: Iterable[str], turns: int, log: WorkLog, data: Path, *of: int
) -> None:
    """Measure what the log lacks."""
    for turn in range(turns):
        names = list(sides)[:: 1 if turn % 2 == 0 else -1]
        for part in parts:
            for name in names:
                key = _key(part, name, turn)
                if log.get(key) is None and not (name == BEFORE and part in ONLY_HERE):
                    log.add(key, measure(sides[name], part, data, *of))


def gathered(log: WorkLog, sides: Iterable[str], turns: int) -> Found:
    """Return what the log has.

    Raises:
        DeepSpecError: the sides found different things of the same data.
    """
    found: Found = {}
    for part in PARTS:
        of = {side: [log.get(_key(part, side, turn)) for turn in range(turns)] for side in sides}
        found[part] = {side: [one for one in runs if one] for side, runs in of.items() if any(runs)}
        results = {one["result"] for runs in found[part].values() for one in runs}
        if part in ALIKE and len(results) > 1:
            raise DeepSpecError("the two versions make other batches of the same data")
    return {part: of for part, of in found.items() if of}


def table(found: Found, rows: int) -> str:
    """Seconds and rates are medians over turns, peaks the highest."""
    lines = []
    for of in found.values():
        for side, runs in of.items():
            for phase, seconds in _seconds(runs).items():
                took = statistics.median(seconds)
                peaks = [run["phases"][phase]["peak_bytes"] for run in runs if phase in run["phases"]]
                count = runs[0]["phases"].get(phase, {}).get("rows", rows)
                ratios = [b / max(a, 1e-9) for a, b in zip(seconds, _other(of, side, phase), strict=False)]
                lines.append(
                    (
                        f"{side}: {phase}",
                        f"{took:.2f}",
                        f"{count / max(took, 1e-9):.0f}",
                        f"{statistics.median(ratios):.1f}×" if ratios else "",
                        f"{min(ratios):.1f}–{max(ratios):.1f}" if len(ratios) > 1 else "",
                        f"{max(peaks) / 2**20:.0f}" if peaks else "",
                    )
                )
    return markdown_table(("phase", "s", "rows/s", "faster", "of turns", "peak MiB"), lines, "tn")


def _seconds(runs: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Return phase → its seconds of each turn, and of a warm start and of the whole part."""
    phases = {name: [run["phases"][name]["seconds"] for run in runs] for name in runs[0]["phases"]}
    if set(WARM) <= phases.keys():
        phases["warm start to the first batch"] = [
            sum(times) for times in zip(*(phases[name] for name in WARM), strict=True)
        ]
        cold = ("read", *WARM[1:], "batches")
        phases["read to the last batch"] = [
            sum(times) for times in zip(*(phases[name] for name in cold), strict=True)
        ]
    return phases


def _other(of: dict[str, list[dict[str, Any]]], side: str, phase: str) -> list[float]:
    """Return the seconds of the other side, with which this one is compared."""
    return _seconds(of[BEFORE])[phase] if side == HERE and of.get(BEFORE) else []


def results(found: Found) -> str:
    """What the parts came to, in a line each."""
    lines = {
        f"- {part}, {side}: {run['result']}"
        for part, of in found.items()
        if part not in ALIKE
        for side, runs in of.items()
        for run in runs
    }
    return "\n".join(sorted(lines))


def arguments() -> argparse.ArgumentParser:
    parser = command_line("scale", __doc__)
    add = parser.add_argument
    add("--rows", type=int, default=1_000_000, help="conversations (default: %(default)s)")
    add("--length", type=int, default=800, help="tokens of one, in the mean (default: %(default)s)")
    add("--steps", type=int, default=100, help="batches that are made (default: %(default)s)")
    add("--parts", nargs="*", choices=list(PARTS), help="what is measured now (default: all)")
    add("--turns", type=int, default=1, help="of each side (default: %(default)s)")
    add("--beside", type=Path, help="a checkout of an earlier version")
    add("--output", type=Path, default=REPORTS, help="folder of the report")
    return parser


def main(argv: list[str] | None = None) -> int:
    flags = arguments().parse_args(argv)
    data = (WORK_DIR / f"conversations-{flags.rows}-{flags.length}").resolve()
    try:
        if flags.beside and not (flags.beside / "deepspec").is_dir():
            raise DeepSpecError(f"--beside {flags.beside}: no checkout of this project there")
        if not data.exists():
            write_data(data, flags.rows, flags.length)
        sides = {HERE: ROOT} | ({BEFORE: flags.beside} if flags.beside else {})
        log = WorkLog(_log_path(data, flags))
        parts = list(PARTS) if flags.parts is None else flags.parts
        collect(sides, parts, flags.turns, log, data, 2 * flags.length, flags.steps)
        found = gathered(log, sides, flags.turns)
    except DeepSpecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    what = f"{flags.rows} conversations of {flags.length} tokens; {flags.rows // SAMPLE} are validated whole."
    body = f"{what}\n\n{table(found, flags.rows)}\n\n{results(found)}"
    name = f"scale-{flags.rows}" + ("-beside" if flags.beside else "")
    write_report(flags.output, name, "A large data set from prompts to the first steps", body, found)
    return 0


def _key(part: str, side: str, turn: int) -> str:
    """Return the name of a result, which holds for the code that it is of."""
    return f"{part} {side} {turn} {code_digest(*CODE[part])}"


def _log_path(data: Path, flags: argparse.Namespace) -> Path:
    """Return where results are kept: of this data, these steps and that other checkout."""
    other = git_or_none(flags.beside, "rev-parse", "HEAD") if flags.beside else ""
    return data.with_name(f"{data.name}-{digest(f'{other} {flags.steps}')}.jsonl")


if __name__ == "__main__":
    sys.exit(main())
