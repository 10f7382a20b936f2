"""The clone that `deepspec reproduce` works in: made at a tag, gone on with if interrupted; and its DVC pipeline."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deepspec.errors import DeepSpecError, nearest
from deepspec.files import replacing, write_json
from deepspec.git import git, git_or_none
from deepspec.reproduce.milestones import Milestone, read_milestones

logger = logging.getLogger(__name__)

STATE = Path(".deepspec/reproduce.json")
STOP_S = 20.0  # a trainer that is told to stop saves its state first


@dataclass(frozen=True)
class Settings:
    """Describe one reproduction.

    Args:
        tag: a tag, a milestone, or anything else that names a commit.
        repo: a path or URL to clone from.
        into: the directory to clone into; None: `deepspec-<tag>`.
        recompute: make data and drafts again instead of pulling them.
        stages: what to run, by name, in place of all (`--recompute`) or of all whose outputs are in git.
        drafter: the one draft that is trained again and judged by its weights.
        pipeline: the dvc.yaml whose metrics are compared; None: the milestone's, or dvc.yaml.
        remote: where to pull from, in place of the remote that the repository names.
        setup: run in an environment made by `make setup` in the clone, not in the present one.
        tolerances: relative ones by pattern of a metric's name.
    """

    tag: str
    repo: str = "."
    into: Path | None = None
    recompute: bool = False
    stages: tuple[str, ...] = ()
    drafter: str | None = None
    pipeline: str | None = None
    remote: str | None = None
    setup: bool = False
    tolerances: tuple[str, ...] = ()

    @property
    def directory(self) -> Path:
        return (self.into or Path(f"deepspec-{self.tag.replace('/', '-')}")).resolve()


@dataclass(frozen=True)
class Stage:
    """A stage of dvc.yaml.

    Args:
        kept: what DVC keeps of its outputs: path → MD5 that dvc.lock has.
        needs: the stages right before it.
        reads: the files and folders that it reads of what DVC keeps: path → MD5.
    """

    address: str
    kept: dict[str, str]
    needs: tuple[str, ...]
    reads: dict[str, str]

    @property
    def name(self) -> str:
        return self.address.rpartition(":")[2]


@dataclass(frozen=True)
class Pipeline:
    """What a dvc.yaml says.

    Args:
        stages: its own and all before them, in an order in which they can run.
        metrics: the files of its metrics.
        in_git: what its stages write and git keeps, files and folders.
        altered: of those files the ones that are not what dvc.lock says was written: path → MD5 found, MD5 written.
    """

    stages: list[Stage]
    metrics: list[str]
    in_git: list[str]
    altered: dict[str, tuple[str, str]]


@dataclass(frozen=True)
class Work:
    """A clone at work: what is asked for, the tag's commit, and the addresses of the stages that are done."""

    settings: Settings
    commit: str
    pipeline: str
    milestone: Milestone | None = None
    done: tuple[str, ...] = ()

    @property
    def root(self) -> Path:
        return self.settings.directory

    def save(self, directory: Path | None = None) -> None:
        write_json(
            (directory or self.root) / STATE,
            {"asked": self.asked, "done": self.done},
        )

    @property
    def asked(self) -> dict[str, Any]:
        """Return what the directory is for: an interrupted run goes on only with the same."""
        mode = "recompute" if self.settings.recompute else "pull"
        drafter = {"drafter": self.settings.drafter} if self.settings.drafter else {}
        return {
            "tag": self.settings.tag,
            "commit": self.commit,
            "mode": mode,
            "pipeline": self.pipeline,
            **drafter,
        }

    @property
    def bin(self) -> Path:
        """Return the bin folder of the environment that everything runs in."""
        return self.root / ".venv/bin" if self.settings.setup else Path(sys.executable).parent

    def call(self, *command: str, **options: Any) -> subprocess.CompletedProcess:
        """Run a command in the clone, with the clone's code before any other."""
        return subprocess.run(command, cwd=self.root, env=self.environment, **options)

    def start(self, *command: str) -> subprocess.Popen:
        """Start a command like `call`, in a session of its own: Ctrl-C does not reach it."""
        return subprocess.Popen(command, cwd=self.root, env=self.environment, start_new_session=True)

    @property
    def environment(self) -> dict[str, str]:
        first = {"PATH": self.bin, "PYTHONPATH": self.root}
        return os.environ | {
            name: os.pathsep.join(filter(None, (str(path), os.environ.get(name))))
            for name, path in first.items()
        }

    def stage(self, address: str) -> subprocess.CompletedProcess:
        """Run a stage, whatever it was. Interrupted, it is told to end by a signal: it shows no traceback."""
        words = ["repro", "--force", "--single-item", address]
        process = self.start(str(self.bin / "python"), "-m", "dvc", *words)
        try:
            return subprocess.CompletedProcess(words, process.wait())
        except BaseException:
            stop(process)
            raise

    def dvc(self, *words: str, **options: Any) -> subprocess.CompletedProcess:
        return self.call(str(self.bin / "python"), "-m", "dvc", *words, **options)

    def plus(self, step: str) -> Work:
        work = replace(self, done=(*self.done, step))
        work.save()
        return work


def open_clone(settings: Settings) -> Work:
    """Make a new clone, or open the one that an interrupted run left.

    Raises:
        DeepSpecError: no such repository, tag or pipeline, or a directory that holds something else.
    """
    directory = settings.directory
    if not directory.is_dir() or not any(directory.iterdir()):
        return _clone(settings)
    try:
        state = json.loads((directory / STATE).read_text())
        known, done = dict(state["asked"]), tuple(state["done"])
    except (OSError, ValueError, KeyError, TypeError):
        raise DeepSpecError(f"{directory}: not empty; choose another directory with --into") from None
    git(directory, "fetch", "--quiet", "--tags", "--force", "origin")
    git_or_none(directory, "remote", "set-head", "origin", "--auto")  # fails where the origin is on no branch
    work = replace(_find(directory, settings, known), done=done)
    if known != work.asked:  # a branch moves, and so may a tag
        raise DeepSpecError(
            f"{directory}: holds another reproduction ({known}), and {settings.tag} is {work.commit[:7]}; "
            "remove it or choose another with --into"
        )
    logger.info("going on in %s", directory)
    return work


def _find(clone: Path, settings: Settings, known: dict[str, Any] | None = None) -> Work:
    """Find the commit of a tag, of a branch of the origin, of a milestone, or of whatever else git knows by the name.

    Args:
        known: what the clone was made for, where an interrupted run is gone on with: an origin that is on no branch
            does not say its milestones again.
    """
    name = settings.tag
    milestones = read_milestones(clone)
    milestone = milestones.get(name)
    known = known if known and known.get("tag") == name else {}
    pipeline = settings.pipeline or (milestone.pipeline if milestone else known.get("pipeline", "dvc.yaml"))
    refs = [f"refs/tags/{name}", f"refs/remotes/origin/{name}", milestone.commit if milestone else name]
    for ref in [*refs, *filter(None, [known.get("commit")])]:
        found = git_or_none(clone, "rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}")
        if found:
            return Work(settings, found, pipeline, milestone)
    if milestone:
        raise DeepSpecError(
            f"{settings.repo} lacks the commit {milestone.commit[:7]} of {name}; it is on the main branch: "
            "`git fetch --unshallow` where the clone is shallow"
        )
    tags = git(clone, "tag", "--list").split()
    there = f"tags: {', '.join(tags) or 'none'}; milestones: {', '.join(milestones) or 'none'}"
    raise DeepSpecError(f"{settings.repo} has no tag {name!r}{nearest(name, [*tags, *milestones])} ({there})")


def _clone(settings: Settings) -> Work:
    here = Path.cwd()
    with replacing(settings.directory) as fresh:
        git(None, "clone", "--quiet", "--no-checkout", settings.repo, str(fresh))
        work = _find(fresh, settings)
        git(fresh, "checkout", "--quiet", "--detach", work.commit)
        if not (fresh / work.pipeline).is_file():
            raise DeepSpecError(f"{settings.tag} has no {work.pipeline}; name another with --pipeline")
        work.save(fresh)
    os.chdir(here)  # which may be the directory that was replaced
    return work


def stop(process: subprocess.Popen) -> None:
    """End a process and all that it started: politely, then not."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signum)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
            return


def take_over_remote(work: Work) -> str | None:
    """Write the remote into the clone's .dvc/config.local, which git ignores.

    It is the one given, or that of a repository on this machine, which may have it in its own config.local,
    or relative to itself.

    Returns:
        The folder that the remote is, if there is no such folder.
    """
    given, source = work.settings.remote, Path(work.settings.repo)
    known = remote_of(source, given)
    if given is not None and known is None:
        path = given if "://" in given else str(Path(given).expanduser().absolute())
        known = "given", {"url": path}
    used = known or remote_of(work.root)
    url = str(used[1].get("url", "")) if used else ""
    if url.startswith(("/", "~")) and not Path(url).expanduser().is_dir():
        return url
    set_remote(work.root, known)
    return None


def remote_of(source: Path, name: str | None = None) -> tuple[str, dict[str, Any]] | None:
    """Return the default DVC remote of a repository on this machine, or the one called `name`, with its options."""
    from dvc.config import Config

    if not (source / ".dvc").is_dir():
        return None
    config = Config(str(source / ".dvc"))
    name = name or config["core"].get("remote")
    options = dict(config["remote"].get(name, {}))
    return (name, options) if options else None


def set_remote(root: Path, remote: tuple[str, dict[str, Any]] | None) -> None:
    """Make it the default of the clone at `root`, by the config that git ignores; None: what the clone says stands."""
    from dvc.repo import Repo

    if remote is None:
        return
    name, options = remote
    with Repo(root) as repo, repo.config.edit("local") as local:
        local["remote"][name] = options
        local["core"]["remote"] = name


def read_pipeline(work: Work) -> Pipeline:
    """Read the pipeline as it is at the tag, whatever has run since.

    Raises:
        DeepSpecError: it or its dvc.lock cannot be read, or it declares no metrics.
    """
    from dvc.exceptions import DvcException

    try:
        return _read_pipeline(work)
    except (DvcException, OSError) as error:
        said = " ".join(str(error).split())
        raise DeepSpecError(f"{work.pipeline} of {work.settings.tag} cannot be read: {said}") from None


def _read_pipeline(work: Work) -> Pipeline:
    import networkx
    from dvc.repo import Repo

    chosen = work.pipeline
    with Repo(work.root, rev=work.commit) as repo:

        def path(of: str) -> str:
            return repo.fs.relpath(of, repo.root_dir)

        def address(stage: Any) -> str:
            return f"{path(stage.path)}:{stage.name}"

        graph = repo.index.graph  # an edge leads to what a stage needs
        own = [stage for stage in graph if path(stage.path) == chosen]
        needed = set(own).union(*(networkx.descendants(graph, stage) for stage in own))
        kept = {
            path(out.fs_path): out.hash_info.value or ""
            for stage in graph
            for out in stage.outs
            if out.use_cache
        }

        def reads(stage: Any) -> dict[str, str]:
            found = {}
            for dep in stage.deps:
                name = path(dep.fs_path)
                if any(within(name, out) for out in kept):
                    found[name] = dep.hash_info.value or ""
                found |= {out: md5 for out, md5 in kept.items() if within(out, name)}
            return found

        stages = [
            Stage(
                address(stage),
                {path(out.fs_path): out.hash_info.value or "" for out in stage.outs if out.use_cache},
                tuple(address(other) for other in graph.successors(stage)),
                reads(stage),
            )
            for stage in networkx.dfs_postorder_nodes(graph)
            if stage in needed
        ]
        outs = [out for stage in own for out in stage.outs]
        metrics = [path(out.fs_path) for out in outs if out.metric]
        in_git = {path(out.fs_path): out.hash_info.value for out in outs if not out.use_cache}
        found = {name: _md5(repo.fs, name) for name in in_git if repo.fs.isfile(name)}
    if not metrics:
        raise DeepSpecError(f"{chosen} at {work.settings.tag} declares no metrics: nothing to compare with")
    altered = {name: (md5, in_git[name]) for name, md5 in found.items() if in_git[name] not in (None, md5)}
    return Pipeline(stages, metrics, [*in_git], altered)


def within(path: str, folder: str) -> bool:
    """Check whether a path of the repository is a folder or lies in it."""
    return path == folder or path.startswith(f"{folder}/")


def _md5(fs: Any, path: str) -> str:
    with fs.open(path, "rb") as file:
        return hashlib.md5(file.read(), usedforsecurity=False).hexdigest()
