"""Published results by name: `milestones.yaml`, in git with the code, so that a name needs no tag and no remote.

Small data that the stages of a milestone read may lie in `milestones/<name>/`, under the paths that they have in the
repository. They are taken from the newest commit, and are what the milestone's dvc.lock names or are refused.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from deepspec.errors import DeepSpecError
from deepspec.git import git, git_bytes, git_or_none

logger = logging.getLogger(__name__)

FILE = "milestones.yaml"
FOLDER = "milestones"
FOLDER_MD5 = ".dir"  # ends the MD5 of a folder in dvc.lock
NEWEST = ("refs/remotes/origin/HEAD", "HEAD")  # where the file is looked for, in a clone


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Way(_Part):
    """One way to bring a milestone back."""

    run: str = Field(description="what to add to `deepspec reproduce NAME`")
    takes: str
    needs: str
    remote: bool = Field(False, description="whether a DVC remote is among that")


class Milestone(_Part):
    """A published result."""

    commit: str = Field(pattern=r"^[0-9a-f]{40}$")
    pipeline: str = "dvc.yaml"
    result: str
    exactly: str = Field(description="what comes back to the last digit, and where")
    within: str = Field(description="what comes back within which tolerance")
    ways: tuple[Way, ...] = Field(description="those without a remote first, the shortest first")


Milestones = dict[str, Milestone]
_MILESTONES = TypeAdapter(Milestones)


def read_milestones(clone: Path) -> Milestones:
    """Return the milestones of a repository or clone, at the newest commit of its main branch; none without the file.

    Raises:
        DeepSpecError: the file is not of that form.
    """
    text = next((text for ref in NEWEST if (text := git_or_none(clone, "show", f"{ref}:{FILE}"))), None)
    if text is None:
        return {}
    try:
        return _MILESTONES.validate_python(yaml.safe_load(text) or {})
    except ValidationError as error:
        found = error.errors()[0]
        where = ".".join(map(str, found["loc"]))
        raise DeepSpecError(f"{FILE}: {where}: {found['msg']}") from None
    except yaml.YAMLError as error:
        raise DeepSpecError(f"{FILE}: {' '.join(str(error).split())}") from None


def milestones_of(repo: str) -> Milestones:
    """Return the milestones of a repository by its path or URL.

    Raises:
        DeepSpecError: no such repository.
    """
    if Path(repo).is_dir():
        git(Path(repo), "rev-parse", "--git-dir")
        return read_milestones(Path(repo))
    with tempfile.TemporaryDirectory() as scratch:
        git(None, "clone", "--quiet", "--depth", "1", "--no-checkout", repo, scratch)
        return read_milestones(Path(scratch))


def take_files(clone: Path, name: str, wanted: dict[str, str]) -> list[str]:
    """Write the milestone's small data that are wanted into the clone; return their paths.

    Args:
        wanted: path of a file or a folder → MD5 that dvc.lock has.

    Raises:
        DeepSpecError: a file is not the one that dvc.lock names.
    """
    taken = []
    for path, md5 in wanted.items():
        files = small_data(clone, name, path, md5)
        for file, data in files.items():
            (clone / file).parent.mkdir(parents=True, exist_ok=True)
            (clone / file).write_bytes(data)
        taken += [path] if files else []
    return taken


def small_data(clone: Path, name: str, path: str, md5: str) -> dict[str, bytes]:
    """Return the files of a milestone that lie in git, path → bytes: one file, or all of a folder; none without them.

    A folder of which there is only a part, or another one, counts as not there: what it lacks may be had elsewhere.

    Raises:
        DeepSpecError: a file is not the one that dvc.lock names.
    """
    for ref in NEWEST:
        if not md5.endswith(FOLDER_MD5):
            data = git_bytes(clone, f"{ref}:{FOLDER}/{name}/{path}")
            if data is None:
                continue
            if _md5(data) != md5:
                raise DeepSpecError(f"{FOLDER}/{name}/{path}: not the file that dvc.lock of {name} names")
            return {path: data}
        place = f"{FOLDER}/{name}/{path}/"
        there = git_or_none(clone, "ls-tree", "-r", "-z", "--name-only", ref, place) or ""
        found = {file: git_bytes(clone, f"{ref}:{file}") or b"" for file in filter(None, there.split("\0"))}
        listed = [
            {"md5": _md5(data), "relpath": file.removeprefix(place)} for file, data in sorted(found.items())
        ]
        if found and f"{_md5(json.dumps(listed).encode())}{FOLDER_MD5}" == md5:  # as DVC makes it
            return {file.removeprefix(f"{FOLDER}/{name}/"): data for file, data in found.items()}
        if found:
            logger.info("%s: not all of it, or not what dvc.lock of %s names: left alone", place, name)
    return {}


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def listed(milestones: Milestones) -> list[str]:
    """Return lines for `--list`: what each one is, what comes back how exactly, and the ways to it."""
    lines = []
    for name, found in milestones.items():
        lines += [
            f"{name}: {found.result}",
            f"  commit {found.commit}, {found.pipeline}",
            f"  exactly: {found.exactly}",
            f"  within tolerance: {found.within}",
        ]
        lines += [f"  {command(name, way)}\n      {way.takes}; needs {way.needs}" for way in found.ways]
    return lines or [f"no {FILE} in this repository; a tag or a commit can be reproduced all the same"]


def command(name: str, way: Way) -> str:
    return f"deepspec reproduce {name} {way.run}".rstrip()
