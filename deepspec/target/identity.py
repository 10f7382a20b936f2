"""Which target a directory holds: a digest of what is in it, whatever its record says.

Files are hashed when they are first met. The user's cache keeps the digest beside size, times and inode of each file,
and while none of these has changed, no file is opened again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from deepspec.errors import DeepSpecError, os_reason
from deepspec.files import digest as digest_of
from deepspec.files import write_json
from deepspec.lineage import code_digest

RECORD = "deepspec.json"
WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
TEXT = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".py")
_SAMPLES, _SAMPLE = 4096, 1 << 20  # of a weight file: places read, bytes at each
_SETTLED = 2.0  # seconds since the last change, before which another one may leave the times as they are


def directory_digest(directory: Path, first: Callable[[Path], None] = lambda directory: None) -> str:
    """Return the identity of a target: its configuration, tokenizer, template and weights, and template arguments.

    Many gigabytes of weights are sampled.

    Args:
        first: called with the directory before its files are read; not where they are known.

    Raises:
        DeepSpecError: a file that cannot be read, or files that are no longer those of the directory's record.
    """
    record = target_record(directory)
    content = _content(directory, bool(record), first)
    found = with_arguments(content, record.get("chat_template_kwargs"), record.get("quantization"))
    if record and record["digest"] != found:
        raise DeepSpecError(
            f"{directory}: its files were changed since they were written: {RECORD} is of target {record['digest']}, "
            f"and {found} is there; make it again, or remove {RECORD} to use it as a target of its own"
        )
    return found


def with_arguments(content: str, options: Mapping[str, Any] | None, quantization: str | None = None) -> str:
    """Return the identity of files whose template is rendered with these arguments, and that an engine quantises."""
    content = digest_of(content + json.dumps(options, sort_keys=True)) if options else content
    return digest_of(f"{content} {quantization}") if quantization else content


def kept_date(directory: Path, source: str) -> str | None:
    """Return the day that the target of this source in the directory is pinned to."""
    kept = target_record(directory)
    return kept.get("template_date") if kept.get("source") == source else None


def target_record(directory: Path) -> dict[str, Any]:
    """Return what was written beside a target when it was resolved; empty for another directory.

    Raises:
        DeepSpecError: a record that cannot be read.
    """
    path = directory / RECORD
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise DeepSpecError(f"{path}: cannot be read: {os_reason(error)}") from None
    except ValueError as error:
        raise DeepSpecError(f"{path}: not valid JSON: {error}") from None
    return found if isinstance(found, dict) and "digest" in found else {}  # a draft's record has none


def write_record(
    directory: Path,
    made: Mapping[str, Any],
    content: str,
    options: Mapping[str, Any],
    pinned: str | None,
    quantization: str | None = None,
) -> None:
    """Write beside a target what it was made of.

    Args:
        made: source, revision and dtype.
        content: digest of its files.
        options: arguments of its template.
        pinned: the day that its template is pinned to.
        quantization: an engine's own.
    """
    record = {**made, "digest": with_arguments(content, options, quantization)}
    found = {"chat_template_kwargs": options, "quantization": quantization}
    record |= {name: value for name, value in found.items() if value}
    if pinned is not None:
        record["template_date"] = pinned
    (directory / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def check_readable(directory: Path) -> None:
    """Refuse a directory with a file that may not be read, which libraries call missing."""
    for path in sorted(path for path in directory.iterdir() if path.suffix in (*TEXT, *WEIGHTS)):
        try:
            path.open("rb").close()
        except OSError as error:
            raise _unreadable(path, error) from None


def _content(directory: Path, recorded: bool, first: Callable[[Path], None]) -> str:
    """Return the digest of a directory's files but its record, found now or kept from when they were last hashed."""
    names = sorted(path for path in directory.iterdir() if not (recorded and path.name == RECORD))
    texts, weights = ([path for path in names if path.suffix in kinds] for kinds in (TEXT, WEIGHTS))
    stamps = {path.name: _stamp(path) for path in (*texts, *weights)}
    key = digest_of(f"{directory.resolve()} {code_digest('deepspec.target.identity')}")
    kept = Path.home() / ".cache/deepspec/digests" / f"{key}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(kept.read_text())
        if known["files"] == stamps:
            return str(known["digest"])
    check_readable(directory)
    first(directory)
    found = _hashed(texts, weights)
    if all(stamp[1] < time.time_ns() - _SETTLED * 1e9 for stamp in stamps.values()):
        with suppress(OSError):  # a home that is not to be written to
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_json(kept, {"digest": found, "files": stamps})
    return found


def _stamp(path: Path) -> list[int]:
    """Return what changes when a file is written to: size, times of its content and of its inode, and the inode."""
    try:
        found = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from None
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _hashed(texts: list[Path], weights: list[Path]) -> str:
    state = hashlib.sha256()
    for path in texts:
        state.update(path.name.encode() + path.read_bytes())
    for path in weights:
        size = path.stat().st_size
        step = max(size // _SAMPLES, _SAMPLE)
        if path.suffix != ".safetensors":
            state.update(path.name.encode())
        with path.open("rb") as file:
            for start in range(0, size, step):
                file.seek(start)
                state.update(file.read(_SAMPLE))
    return state.hexdigest()[:16]


def _unreadable(path: Path, error: OSError) -> DeepSpecError:
    return DeepSpecError(f"{path}: cannot be read: {os_reason(error)}")
