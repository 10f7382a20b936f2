"""What a change costs on a target: passes over 1 and 8 tokens, and tokens/s, beside another commit's.

Each commit runs in a process of its own, the other one in a git worktree that is removed in the end; they are asked
line by line, one at a time. A turn asks each of them for everything, and who comes first changes with every turn, so
a slow minute of the machine hits both. A process may be some percent slower for the memory pages that it happens to
get, so both are started anew every few turns, the other one first each time; a commit beside itself (`HEAD`) shows how
much that leaves.

Ratios are of the same turn (under 1: this checkout is faster); the median and its 95 % interval, by a bootstrap over
turns. That both write the same tokens is checked all along. Finished turns are kept in a work file: a killed benchmark
goes on where it stopped, and with fewer `--turns` it reports what is there.

    python -m benchmarks.commits 17885f3 --target embedded:smollm2-135m-instruct --turns 40
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np

from benchmarks.common import REPORTS, WORK_DIR, command_line, write_report
from benchmarks.training import ratio
from deepspec.entry import guarded, quiet_environment
from deepspec.errors import DeepSpecError
from deepspec.files import digest
from deepspec.journal import WorkLog
from deepspec.lineage import code_digest
from deepspec.markdown import markdown_table
from deepspec.progress import Progress
from deepspec.target.embedded import PREFIX

ROOT = Path(__file__).parents[1]
HERE, THERE = "here", "there"
_UNTIMED = 1
Found = dict[str, dict[str, list[float]]]  # measurement → side → seconds, one a turn
Start = Callable[[Sequence[str]], AbstractContextManager[Mapping[str, "Side"]]]


class Side:
    """A process of one commit that measures when asked.

    Raises:
        DeepSpecError: it does not start, or dies.
    """

    def __init__(self, name: str, checkout: Path, directory: str, context: int, threads: int):
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, "-P", ROOT / "benchmarks/commit_side.py", directory, str(context), str(threads)],
            cwd=checkout,
            env=os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._line()

    def ask(self, question: dict[str, Any]) -> dict[str, list]:
        """Return seconds and tokens of a measurement."""
        _there(self._process.stdin).write(json.dumps(question) + "\n")
        _there(self._process.stdin).flush()
        return json.loads(self._line())

    def close(self) -> None:
        _there(self._process.stdin).close()
        self._process.wait()

    def _line(self) -> str:
        for line in _there(self._process.stdout):
            if line.startswith(("ready", "{")):
                return line
        said = _there(self._process.stderr).read().strip().splitlines()[-1:] or ["no message"]
        raise DeepSpecError(f"{self.name} stopped: {said[0]}")


def _there(stream: IO[str] | None) -> IO[str]:
    if stream is None:
        raise DeepSpecError("a side without its pipes")
    return stream


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """Yield a worktree of a commit, and remove it in the end.

    Raises:
        DeepSpecError: no such commit.
    """
    with tempfile.TemporaryDirectory(prefix="deepspec-") as scratch:
        place = Path(scratch) / "checkout"
        git = ["git", "-C", str(ROOT), "worktree"]
        added = subprocess.run([*git, "add", "--detach", place, commit], capture_output=True, text=True)
        if added.returncode:
            raise DeepSpecError(f"{commit}: {added.stderr.strip().splitlines()[-1]}")
        try:
            yield place
        finally:
            subprocess.run([*git, "remove", "--force", place], capture_output=True, check=False)


def questions(turn: int, tokens: int, repeats: int) -> dict[str, dict[str, Any]]:
    """Return what both sides are asked in a turn, by its name."""
    wide = {"prompt": turn, "tokens": tokens, "repeats": 1}
    return {
        "T(1)": {"measure": "pass", "tokens": 1, "repeats": repeats},
        "T(8)": {"measure": "pass", "tokens": 8, "repeats": repeats},
        "seconds a token, plain": {"measure": "plain", **wide},
        "seconds a token, lookup": {"measure": "lookup", **wide},
    }


def measure(start: Start, flags: argparse.Namespace, log: WorkLog) -> tuple[Found, list[str]]:
    """Return seconds of every turn, and where the two wrote other tokens.

    Args:
        start: starts both sides in the order given, every few turns; not called where all turns are in the log.
    """
    missing = [turn for turn in range(flags.turns) if log.get(_key(turn)) is None]
    with Progress("turns", flags.turns, flags.turns - len(missing)) as progress:
        for first in range(0, len(missing), flags.restart):
            with start(_order(first // flags.restart)) as sides:
                for turn in range(_UNTIMED):
                    one_turn(sides, turn, flags)
                for turn in missing[first : first + flags.restart]:
                    log.add(_key(turn), one_turn(sides, turn, flags))
                    progress.advance()
    turns = [log.get(_key(turn)) for turn in range(flags.turns)]
    names = questions(0, flags.tokens, flags.repeats)
    found = {name: {side: [turn[name][side] for turn in turns] for side in (HERE, THERE)} for name in names}
    return found, [f"{name}, turn {i}" for i, turn in enumerate(turns) for name in turn["differ"]]


def one_turn(sides: Mapping[str, Side], turn: int, flags: argparse.Namespace) -> dict[str, Any]:
    """Return measurement → side → seconds of one turn, and under "differ" those that wrote other tokens."""
    order = _order(turn)
    found: dict[str, Any] = {"differ": []}
    for name, question in questions(turn, flags.tokens, flags.repeats).items():
        answers = {side: sides[side].ask(question) for side in order}
        if answers[HERE]["tokens"] != answers[THERE]["tokens"]:
            found["differ"].append(name)
        found[name] = {
            side: float(np.median(answer["seconds"]))
            / (1 if question["measure"] == "pass" else len(answer["tokens"]))
            for side, answer in answers.items()
        }
    return found


def _order(time: int) -> Sequence[str]:
    """Return who comes first: each of the two every other time, for neither gains by it."""
    return (HERE, THERE) if time % 2 else (THERE, HERE)


def _key(turn: int) -> str:
    return f"turn {turn}"


def summary(found: Found) -> dict[str, dict[str, Any]]:
    """Return of each measurement the medians, in milliseconds, and this checkout's time over the other's."""
    return {
        name: {
            **{side: float(np.median(seconds)) * 1e3 for side, seconds in sides.items()},
            "ratio": asdict(ratio(sides[THERE], sides[HERE])),
            "turns": len(sides[HERE]),
        }
        for name, sides in found.items()
    }


def table(made: dict[str, dict[str, Any]], commit: str) -> str:
    rows = [
        (
            name,
            f"{one[HERE]:.2f}",
            f"{one[THERE]:.2f}",
            f"{one['ratio']['value']:.3f} ({one['ratio']['low']:.3f} – {one['ratio']['high']:.3f})",
        )
        for name, one in made.items()
    ]
    return markdown_table(["", "here, ms", f"{commit}, ms", "here / there"], rows, "tn")


def arguments() -> argparse.ArgumentParser:
    parser = command_line("commits", __doc__)
    add = parser.add_argument
    add("commit", help="what this checkout is compared with")
    add("--target", default="data/target", help="a directory, or embedded:<name> (default data/target)")
    add("--turns", type=int, default=40, help="timed turns (default 40)")
    add("--restart", type=int, default=4, help="turns after which both start anew (default 4)")
    add("--repeats", type=int, default=20, help="passes of a turn, of which the median counts (default 20)")
    add("--tokens", type=int, default=48, help="to write a turn (default 48)")
    add("--context", type=int, default=256, help="tokens before a timed pass (default 256)")
    add("--threads", type=int, default=1, help="of each side (default 1)")
    add("--output", type=Path, default=REPORTS, help="folder of the report")
    return parser


def main(argv: list[str] | None = None) -> int:
    flags = arguments().parse_args(argv)
    quiet_environment()
    return guarded(lambda: run(flags))


def run(flags: argparse.Namespace) -> None:
    directory = flags.target
    if directory.startswith(PREFIX):
        from deepspec.target.model import load_target

        directory = load_target(directory, device="cpu").source
    directory = str(Path(directory).resolve())
    code = code_digest("deepspec.decoding.engine")
    settings = (
        flags.commit,
        directory,
        code,
        flags.restart,
        flags.repeats,
        flags.tokens,
        flags.context,
        flags.threads,
    )
    log = WorkLog(WORK_DIR / f"commits-{digest(json.dumps(settings))}.jsonl")
    with checked_out(flags.commit) as checkout:
        places = {HERE: ROOT, THERE: checkout}
        found, differ = measure(lambda order: both(order, places, flags, directory), flags, log)
    made = summary(found)
    body = table(made, flags.commit)
    body += f"\n\nOther tokens: {'; '.join(differ) if differ else 'none'}."
    write_report(flags.output, "commits", f"Beside {flags.commit}", body, {"found": made, "differ": differ})
    log.remove()


@contextmanager
def both(
    order: Sequence[str], places: Mapping[str, Path], flags: argparse.Namespace, directory: str
) -> Iterator[Mapping[str, Side]]:
    """Yield this checkout's side and the other commit's, started in this order."""
    sides: dict[str, Side] = {}
    try:
        for name in order:
            sides[name] = Side(name, places[name], directory, flags.context, flags.threads)
        yield sides
    finally:
        for side in sides.values():
            side.close()


if __name__ == "__main__":
    sys.exit(main())
