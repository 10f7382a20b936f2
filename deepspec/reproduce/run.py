"""`deepspec reproduce TAG`: a published result brought back in an empty directory, and each figure beside the old one.

The repository is cloned at the tag, or at the commit of a milestone (`milestones.py`). What DVC keeps (data, drafts) is
pulled, or with `--recompute` made again; what git keeps (evaluation records, metrics, the report) is
always measured again, by the stages of the tag's own dvc.yaml. `tolerance.py` then judges every metric that DVC knows.
`--drafter` trains one draft again and judges that alone. A run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import json
import logging
import subprocess
from collections.abc import Mapping
from typing import Any

import yaml

from deepspec.errors import DeepSpecError, nearest
from deepspec.files import write_json
from deepspec.git import git
from deepspec.reproduce import tolerance
from deepspec.reproduce.checkout import (
    Pipeline,
    Settings,
    Stage,
    Work,
    open_clone,
    read_pipeline,
    take_over_remote,
    within,
)
from deepspec.reproduce.draft import draft_of, judge_draft
from deepspec.reproduce.milestones import command, small_data, take_files
from deepspec.reproduce.outcome import Outcome, show
from deepspec.reproduce.pulled import not_as_locked
from deepspec.reproduce.tolerance import Figures, Row

logger = logging.getLogger(__name__)

RESULT = "reproduce.json"


def run(settings: Settings) -> bool:
    """Reproduce and compare; True if every metric that can be compared matches.

    Raises:
        DeepSpecError: no such tag, a directory that holds something else, nothing in the remote, no committed
            metrics, or a stage that failed.
    """
    chosen = tolerance.parse(settings.tolerances)
    if settings.drafter and settings.stages:
        raise DeepSpecError("--drafter goes without --stages: it trains that draft again")
    work = open_clone(settings)
    pipeline = read_pipeline(work)
    todo = _todo(work, pipeline.stages)
    then = _committed(work, pipeline)
    if settings.setup and "setup" not in work.done:
        _or_fail(work, "make setup", work.call("make", "setup"))
        work = work.plus("setup")
    if "pull" not in work.done:
        _bring(work, pipeline, todo)
        work = work.plus("pull")
    for record in then.records.values():
        plant_costs(record)
    for i, address in enumerate(todo, 1):
        if address not in work.done:
            logger.info("%d/%d %s", i, len(todo), address)
            _or_fail(work, f"stage {address}", work.stage(address))
            work = work.plus(address)
    outcome = (
        judge_draft(work, pipeline, todo, then.records)
        if settings.drafter
        else _judged(work, pipeline, then, chosen)
    )
    write_json(work.root / RESULT, work.asked | {"measured": todo} | outcome.to_json())
    show(settings, outcome)
    return outcome.passed


def _judged(work: Work, pipeline: Pipeline, then: Figures, chosen: dict[str, float]) -> Outcome:
    """Compare every metric of the pipeline."""
    now = _measured(work, pipeline)
    return Outcome(
        [Row(path, *md5, "as in dvc.lock", False) for path, md5 in pipeline.altered.items()]
        + tolerance.compare(then, now, work.settings.recompute, chosen),
        {
            name: tolerance.differences(record, now.records[name])
            for name, record in then.records.items()
            if name in now.records
        },
        sorted(
            name for name, record in then.records.items() if record.get("provenance", {}).get("git_dirty")
        ),
    )


def _todo(work: Work, stages: list[Stage]) -> list[str]:
    """Return the stages to run. Without data to make: those whose outputs are all in git, which are the claim.

    The small data of a milestone, which git has, are made again only where their stage is named.
    """
    settings = work.settings
    if settings.drafter:
        return _training(work, stages)
    if not settings.stages:
        found = [
            stage.address
            for stage in stages
            if not stage.kept or (settings.recompute and not _is_given(work, stage))
        ]
        if not found:
            raise DeepSpecError(f"{work.pipeline}: DVC keeps every output; name what to run with --stages")
        return found
    names = [stage.name for stage in stages]
    for word in settings.stages:
        if not any(word in (name, name.split("@")[0]) for name in names):
            raise DeepSpecError(f"{work.pipeline} has no stage {word!r}{nearest(word, names)}")
    return [
        stage.address for stage in stages if {stage.name, stage.name.split("@")[0]} & set(settings.stages)
    ]


def _training(work: Work, stages: list[Stage]) -> list[str]:
    """Return the stage that trains the chosen draft and all before it, but what git has."""
    settings = work.settings
    drafts = {draft: stage for stage in stages if (draft := draft_of(stage))}
    wanted = [draft for draft in drafts if settings.drafter in (draft, drafts[draft].name.rpartition("@")[2])]
    if not wanted:
        raise DeepSpecError(
            f"no draft {settings.drafter!r}{nearest(str(settings.drafter), drafts)} (drafts: {', '.join(drafts)})"
        )
    found = {drafts[wanted[0]].address}
    for stage in reversed(stages):  # each stands behind those that it needs
        if stage.address in found and (draft_of(stage) == wanted[0] or not _is_given(work, stage)):
            found |= set(stage.needs)
        else:
            found.discard(stage.address)
    return [stage.address for stage in stages if stage.address in found]


def _is_given(work: Work, stage: Stage) -> bool:
    """Check whether git has all that a stage writes: in the commit, or among the small data of the milestone."""
    return all(small_data(work.root, work.settings.tag, path, md5) for path, md5 in stage.kept.items())


def _bring(work: Work, pipeline: Pipeline, todo: list[str]) -> None:
    """Bring what the stages read and do not make: from the milestone's small data in git, the rest from the remote."""
    running = [stage for stage in pipeline.stages if stage.address in todo]
    made = [path for stage in running for path in stage.kept]
    wanted = {
        path: md5
        for stage in running
        for path, md5 in stage.reads.items()
        if not any(within(path, out) for out in made)
    }
    wanted = {
        path: md5
        for path, md5 in wanted.items()
        if not any(within(path, other) for other in wanted.keys() - {path})
    }
    if taken := take_files(work.root, work.settings.tag, wanted):
        logger.info("from git: %s", ", ".join(taken))
    rest = sorted(wanted.keys() - set(taken))
    if not rest:
        return
    if unnamed := [path for path in rest if not wanted[path]]:
        raise _no_data(work, pipeline, f"dvc.lock does not name {', '.join(unnamed)}")
    missing = take_over_remote(work)
    if missing:
        raise _no_data(work, pipeline, f"there is no directory {missing}")
    logger.info("pulling %s", ", ".join(rest))
    done = work.dvc("pull", *rest, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        error = next((line for line in said if line.startswith("ERROR")), said[-1] if said else "no message")
        raise _no_data(work, pipeline, f"dvc pull: {error.removeprefix('ERROR: ')}")
    for path in rest:
        if others := not_as_locked(work.root, path, wanted[path]):
            raise _no_data(work, pipeline, f"{', '.join(others)}: not the files that dvc.lock names")


def _no_data(work: Work, pipeline: Pipeline, why: str) -> DeepSpecError:
    """Return the error for data that cannot be had, which ends with what works without them."""
    settings, tag = work.settings, work.settings.tag
    if work.milestone:
        ways = [f"`{command(tag, way)}` ({way.takes})" for way in work.milestone.ways if not way.remote]
    else:
        own = f"deepspec reproduce {tag}" + (
            "" if work.pipeline == "dvc.yaml" else f" --pipeline {work.pipeline}"
        )
        records = [stage.name for stage in pipeline.stages if not stage.kept and not stage.reads]
        ways = [f"`{own} --stages {','.join(records)}` (from committed records)"] if records else []
        ways += [f"`{own} --recompute`"]
    elsewhere = " ".join(
        f"{flag} {value}"
        for flag, value in (("--repo", settings.repo), ("--into", settings.into))
        if value not in (".", None)
    )
    return DeepSpecError(
        f"the remote lacks data of {tag} ({why}); run `dvc push` where the tag was made, give the right --remote, or "
        f"use --recompute. What works without it{f' (with {elsewhere})' if elsewhere else ''}: {', or '.join(ways)}"
    )


def plant_costs(record: Mapping[str, Any]) -> None:
    """Give this machine the cost curve that a record was measured with.

    Only where it is the same machine by name and has none of its own: the controller then decides as it did, and
    τ can be compared exactly.

    The files are those of `decoding/profiles.py`: passes under the identity without the drafter, drafts with it, and
    those of chains under theirs. Of drafts they hold `measured`, the ratio to a pass over one token a request, and so
    of what more context and verdicts add; the code of earlier commits reads `seconds`."""
    from deepspec.decoding.profiles import SLOPES, VERDICT, file_name, profiles_folder
    from deepspec.decoding.shapes import CHAIN

    costs = record.get("round_costs") or {}
    identity = costs.get("identity") or {}
    passes = {
        key: value for key, value in identity.items() if key not in ("drafter", "drafter_code", "shape")
    }
    seconds, drafts = costs.get("passes") or {}, costs.get("drafts") or {}
    points = {requests: dict(pairs) for requests, pairs in seconds.items()}
    plain = {requests: own[int(requests)] for requests, own in points.items() if int(requests) in own}
    measured = dict(seconds)
    if plain:
        one = plain[min(plain, key=int)]
        if slopes := costs.get("slopes"):
            measured[str(SLOPES)] = [[width, more / one] for width, more in slopes]
        if verdict := costs.get("verdict"):
            measured[str(VERDICT)] = [[1, verdict / one]]
    parts = [(passes, seconds, measured)]
    if identity.get("drafter"):
        chains = identity | {"shape": repr(CHAIN)}
        for owner, table in ((identity, drafts), (chains, costs.get("chain_drafts") or {})):
            ratios = {requests: table[requests] / plain[requests] for requests in table.keys() & plain.keys()}
            parts.append((owner, table, ratios))
    for owner, told, kept in parts:
        path = profiles_folder() / file_name(owner)
        if owner and told and not path.exists():
            write_json(path, {"identity": owner, "seconds": told, "measured": kept})


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
        try:
            text = fs.read_text(path)
            values = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
        except (OSError, ValueError, yaml.YAMLError) as error:
            where = f"of {work.settings.tag}" if revision else f"in {work.root}"
            raise DeepSpecError(f"{path} {where} cannot be read: {' '.join(str(error).split())}") from None
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
