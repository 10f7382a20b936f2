"""`deepspec reproduce TAG`: a published result brought back in an empty directory, and each figure beside the old one.

The repository is cloned at the tag. What DVC keeps (data, drafts) is pulled, or with `--recompute` made again from
nothing; what git keeps (evaluation records, metrics, the report) is always measured again, by the stages of the tag's
own dvc.yaml. `tolerance.py` then judges every metric that DVC knows. A run that was interrupted goes on where it
stopped.
"""

from __future__ import annotations

import json
import logging
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from deepspec.errors import DeepSpecError, nearest
from deepspec.files import digest, write_json
from deepspec.git import git
from deepspec.reproduce import tolerance
from deepspec.reproduce.checkout import (
    Pipeline,
    Settings,
    Stage,
    Work,
    asked,
    open_clone,
    read_pipeline,
    take_over_remote,
)
from deepspec.reproduce.tolerance import Difference, Figures, Row

logger = logging.getLogger(__name__)

RESULT = "reproduce.json"


@dataclass(frozen=True)
class Outcome:
    """Every metric with its verdict, by drafter what was not as it was, and whose records came from changed code."""

    rows: list[Row]
    differences: dict[str, list[Difference]]
    dirty: list[str]

    @property
    def passed(self) -> bool:
        return all(row.matches is not False for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "metrics": [asdict(row) | {"verdict": row.verdict} for row in self.rows],
            "differences": {
                name: [asdict(fact) for fact in facts] for name, facts in self.differences.items()
            },
            "uncommitted_code": self.dirty,
        }


def run(settings: Settings) -> bool:
    """Reproduce and compare; True if every metric that can be compared matches.

    Raises:
        DeepSpecError: no such tag, a directory that holds something else, nothing in the remote, no committed
            metrics, or a stage that failed.
    """
    chosen = tolerance.parse(settings.tolerances)
    work = open_clone(settings)
    pipeline = read_pipeline(work)
    todo = _todo(settings, pipeline.stages)
    then = _committed(work, pipeline)
    if settings.setup and "setup" not in work.done:
        _or_fail(work, "make setup", work.call("make", "setup"))
        work = work.plus("setup")
    if "pull" not in work.done:
        _pull(work, _wanted(pipeline.stages, todo))
        work = work.plus("pull")
    for record in then.records.values():
        plant_costs(record)
    for i, address in enumerate(todo, 1):
        if address not in work.done:
            logger.info("%d/%d %s", i, len(todo), address)
            _or_fail(work, f"stage {address}", work.dvc("repro", "--force", "--single-item", address))
            work = work.plus(address)
    now = _measured(work, pipeline)
    outcome = Outcome(
        [Row(path, *md5, "as in dvc.lock", False) for path, md5 in pipeline.altered.items()]
        + tolerance.compare(then, now, settings.recompute, chosen),
        {
            name: tolerance.differences(record, now.records[name])
            for name, record in then.records.items()
            if name in now.records
        },
        sorted(
            name for name, record in then.records.items() if record.get("provenance", {}).get("git_dirty")
        ),
    )
    write_json(work.root / RESULT, asked(settings, work.commit) | {"measured": todo} | outcome.to_json())
    show(settings, outcome)
    return outcome.passed


def _todo(settings: Settings, stages: list[Stage]) -> list[str]:
    """Return the stages to run. Without data to make: those whose outputs are all in git, which are the claim."""
    if not settings.stages:
        found = [stage.address for stage in stages if settings.recompute or not stage.kept]
        if not found:
            raise DeepSpecError(
                f"{settings.pipeline}: DVC keeps every output; name what to run with --stages"
            )
        return found
    names = [stage.address.rpartition(":")[2] for stage in stages]
    for word in settings.stages:
        if not any(word in (name, name.split("@")[0]) for name in names):
            raise DeepSpecError(f"{settings.pipeline} has no stage {word!r}{nearest(word, names)}")
    return [
        stage.address
        for stage, name in zip(stages, names, strict=True)
        if {name, name.split("@")[0]} & set(settings.stages)
    ]


def _wanted(stages: list[Stage], todo: list[str]) -> list[str]:
    """Return the stages whose kept outputs are read by those that run; none where all are to run."""
    read = {need for stage in stages if stage.address in todo for need in stage.needs}
    return [stage.address for stage in stages if stage.kept and stage.address in read - set(todo)]


def _pull(work: Work, addresses: list[str]) -> None:
    if not addresses:
        return
    take_over_remote(work)
    logger.info("pulling what %s made", ", ".join(addresses))
    done = work.dvc("pull", *addresses, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        error = next((line for line in said if line.startswith("ERROR")), said[-1] if said else "no message")
        raise DeepSpecError(
            f"the remote lacks data of {work.settings.tag} (dvc pull: {error.removeprefix('ERROR: ')}); run `dvc push` "
            "where the tag was made, give the right --remote, or use --recompute"
        )


def plant_costs(record: Mapping[str, Any]) -> None:
    """Give this machine the cost curve that a record was measured with.

    Only where it is the same machine by name and has none of its own: the controller then decides as it did, and
    τ can be compared exactly.

    The files are those of `decoding/cost.py`: passes under the identity without the drafter, drafts with it."""
    from deepspec.decoding.cost import profiles_folder

    costs = record.get("round_costs") or {}
    identity = costs.get("identity") or {}
    passes = {
        key: value for key, value in identity.items() if key not in ("drafter", "drafter_code", "shape")
    }
    parts = [(passes, costs.get("passes"))]
    if identity.get("drafter"):
        parts.append((identity, costs.get("drafts")))
    for owner, seconds in parts:
        path = profiles_folder() / f"{digest(json.dumps(owner, sort_keys=True))}.json"
        if owner and seconds and not path.exists():
            write_json(path, {"identity": owner, "seconds": seconds})


def _committed(work: Work, pipeline: Pipeline) -> Figures:
    found = _metrics(work, pipeline.metrics, work.commit)
    if not found:
        raise DeepSpecError(f"{work.settings.tag} has no committed metrics in {', '.join(pipeline.metrics)}")
    tracked = git(work.root, "ls-tree", "-r", "-z", "--name-only", work.commit).split("\0")
    texts = {path: git(work.root, "show", f"{work.commit}:{path}") for path in _json(tracked, pipeline)}
    return Figures(found, _records(texts))


def _measured(work: Work, pipeline: Pipeline) -> Figures:
    there = [
        str(file.relative_to(work.root))
        for path in pipeline.in_git
        for file in (work.root / path, *(work.root / path).rglob("*"))
        if file.is_file()
    ]
    texts = {path: (work.root / path).read_text() for path in _json(there, pipeline)}
    return Figures(_metrics(work, pipeline.metrics, None), _records(texts))


def _json(paths: list[str], pipeline: Pipeline) -> list[str]:
    """List the files that the pipeline wrote and that may be evaluation records."""
    roots = tuple(f"{path}/" for path in pipeline.in_git)
    return [path for path in paths if path.endswith(".json") and f"{path}/".startswith(roots)]


def _metrics(work: Work, paths: list[str], revision: str | None) -> dict[str, Any]:
    """At a commit, or (None) as they are now. A name that two files have is told apart by the file's."""
    from dvc.api import DVCFileSystem

    found: dict[str, Any] = {}
    fs = DVCFileSystem(str(work.root), rev=revision)
    for path in filter(fs.exists, paths):
        text = fs.read_text(path)
        values = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
        for name, value in tolerance.flatten(values).items():
            found[f"{path}:{name}" if name in found else name] = value
    return found


def _records(texts: dict[str, str]) -> dict[str, dict]:
    """Return the JSON files that are evaluation records, by drafter: `dspark`, or `seed-0/dspark` in a folder."""
    found = {}
    for path, text in texts.items():
        try:
            record = json.loads(text)
        except ValueError:
            continue
        if isinstance(record, dict) and {"eval_version", "drafter", "tasks", "summary"} <= set(record):
            found[path.split("eval/", 1)[-1].removesuffix(".json")] = record
    return found


def _or_fail(work: Work, name: str, done: subprocess.CompletedProcess) -> None:
    if done.returncode:
        raise DeepSpecError(f"{name} failed in {work.root}; what it said stands above; run again to go on")


def show(settings: Settings, outcome: Outcome) -> None:
    """Print what was not as it was, the table and the verdict."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    grid = Table(title=f"{settings.tag}, committed and now")
    for i, column in enumerate(("metric", "committed", "now", "tolerance", "verdict")):
        grid.add_column(column, justify="right" if i in (1, 2) else "left", overflow="fold")
    for row in outcome.rows:
        style = None if row.matches else "red" if row.matches is False else "dim"
        grid.add_row(
            row.metric, _text(row.committed), _text(row.now), row.tolerance, row.verdict, style=style
        )
    console.print(grid)
    for name in outcome.dirty:
        console.print(f"note: {name} was measured with uncommitted changes of the code", highlight=False)
    for fact, names in _by_fact(outcome.differences).items():
        effect = "" if fact.decides else " (decides no token)"
        console.print(
            f"{', '.join(names)}: {fact.name} was {fact.then}, is {fact.now}{effect}", highlight=False
        )
    counts = [sum(row.matches is kind for row in outcome.rows) for kind in (True, False, None)]
    console.print(
        f"{counts[0]} of {counts[0] + counts[1]} match, {counts[2]} not compared: "
        f"{settings.tag} {'is reproduced' if outcome.passed else 'is NOT reproduced'}",
        highlight=False,
    )
    for row in outcome.rows:
        if row.matches is False:
            console.print(f"differs: {row.metric}: {row.committed} committed, {row.now} now", highlight=False)


def _by_fact(differences: dict[str, list[Difference]]) -> dict[Difference, list[str]]:
    found: dict[Difference, list[str]] = {}
    for name, facts in differences.items():
        for fact in facts:
            found.setdefault(fact, []).append(name)
    return found


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)
