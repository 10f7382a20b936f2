"""Prompts that others wrote: JSONL files and Hugging Face datasets, both read into conversations.

A file is read twice and never held: once to check every line and note where the good ones begin, by all cores, then
line by line in an order drawn from the seed.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import random
import re
import shutil
import tempfile
import zlib
from abc import ABC, abstractmethod
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

from deepspec.errors import DeepSpecError
from deepspec.messages.errors import BadRowError, RefusedRowError
from deepspec.messages.hub import load_split, stored_rows, without_nulls
from deepspec.messages.presets import Preset
from deepspec.messages.prompt import Chat
from deepspec.messages.rows import REQUESTS, USUAL, Columns, Read, read_row
from deepspec.parallel import ordered_map
from deepspec.progress import Progress

TABLES = (".parquet", ".arrow", ".feather", ".csv", ".tsv", ".zip")  # no lines of JSON
LONGEST_LINE = 1 << 26  # bytes; a longer one is not read into memory
_CHUNK = 1 << 20  # characters of a JSON array that are read at once
_ARRAY = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[\s*\{")
_BETWEEN = re.compile(r"[\s,]*")
_PIECE, _PIECE_BYTES = 512, 1 << 18  # lines that are checked at once, and bytes
_QUIET = 32  # MiB of a file that is checked without a display

_Line = tuple[int, int, bytes | None]  # number, offset, text; None: too long to be read


@dataclass(frozen=True)
class Candidate:
    """A prompt that may become part of the training set, unless its source already found a `fault`."""

    chat: Chat
    fault: str | None = None
    left_out: tuple[str, ...] = ()

    @property
    def turns(self) -> list[str]:
        """Return the texts of the user's messages."""
        return list(self.chat.turns)


class _Bad(NamedTuple):
    """What is wrong with a line; an exception would keep the frames that it went through."""

    line: int
    kind: str
    found: str
    refused: bool


@dataclass
class Faults:
    """Rows of a source that cannot be used: how many of each kind, and where the first is."""

    rows: int = 0  # good ones too
    malformed: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, int] = field(default_factory=dict)  # kind → line
    example: tuple[int, str] | None = None  # the first malformed line, and what was found

    def add(self, bad: _Bad) -> None:
        """Count a row."""
        self.counts[bad.kind] += 1
        self.first.setdefault(bad.kind, bad.line)
        if not bad.refused:
            self.malformed += 1
            self.example = self.example or (bad.line, bad.found)

    def to_dict(self) -> dict[str, dict[str, int]]:
        """Return kind → rows and the number of its first line."""
        return {kind: {"rows": n, "first_line": self.first[kind]} for kind, n in sorted(self.counts.items())}


class Listing(ABC):
    """Prompts that are there already; what is read of a source, and what becomes of it, which any process may do.

    Attributes:
        faults: rows that were left out before anything is read.
    """

    def __init__(self) -> None:
        self.faults = Faults()

    @abstractmethod
    def raws(self) -> Iterator[Any]:
        """Yield rows as they are stored."""

    @abstractmethod
    def read(self, raw: Any) -> Candidate:
        """Return what a row is."""

    def __iter__(self) -> Iterator[Candidate]:
        return map(self.read, self.raws())


class Given(Listing):
    """Candidates of the project's own."""

    def __init__(self, candidates: Iterable[Candidate]) -> None:
        super().__init__()
        self._candidates = candidates

    def raws(self) -> Iterator[Candidate]:
        return iter(self._candidates)

    def read(self, raw: Candidate) -> Candidate:
        return raw


class JsonlSource(Listing):
    """The conversations of a JSONL file (packed ones too), in an order drawn from a seed.

    The whole file is checked at once; blank lines are skipped.

    Args:
        max_malformed_share: lines that may be malformed.

    Raises:
        DeepSpecError: no such file, or too many malformed lines; the first is named.
    """

    def __init__(self, path: str, seed: int, max_malformed_share: float = 0.0, columns: Columns = USUAL):
        super().__init__()
        self.path, self._columns = Path(path), columns
        self._file = _plain(self.path)
        self._offsets = array("Q")
        mebibytes = os.fstat(self._file.fileno()).st_size >> 20
        with Progress(f"{self.path.name} (MiB)", mebibytes, shown=mebibytes > _QUIET) as progress:
            for offsets, bad in ordered_map(self._checked, _pieces(_lines(self._file, self.path))):
                self.faults.rows += len(offsets) + len(bad)
                self._offsets.extend(offsets)
                for each in bad:
                    self.faults.add(each)
                progress.advance((self._offsets[-1] >> 20) - progress.done if self._offsets else 0)
        self._check(max_malformed_share)
        random.Random(seed).shuffle(self._offsets)  # type: ignore[arg-type]

    def raws(self) -> Iterator[bytes]:
        for offset in self._offsets:
            self._file.seek(offset)
            yield self._file.readline()

    def read(self, raw: bytes) -> Candidate:
        found = read_row(_parsed(raw), self._columns)
        return Candidate(found.chat, left_out=found.left_out)

    def _checked(self, lines: list[_Line]) -> tuple[array[int], list[_Bad]]:
        """Return where good lines begin, and what is wrong with the bad ones."""
        good, bad = array("Q"), list[_Bad]()
        for number, offset, line in lines:
            if line is not None and not line.strip():
                continue
            try:
                read_row(_parsed(line), self._columns)
                good.append(offset)
            except BadRowError as error:
                refused = isinstance(error, RefusedRowError)
                bad.append(_Bad(number, error.kind, str(error), refused))
        return good, bad

    def _check(self, allowed: float) -> None:
        faults = self.faults
        if faults.example is None or faults.malformed <= allowed * faults.rows:
            return
        line, found = faults.example
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(faults.counts.items()))
        raise DeepSpecError(
            f"{self.path}:{line}: malformed line: {found}; {faults.malformed} of {faults.rows} lines are malformed "
            f"({kinds}), more than prompts.max_malformed_share allows ({allowed:.1%})"
        )


def read_jsonl(path: str | Path) -> list[Read]:
    """Read every line of a JSONL file (packed ones too) into a conversation; blank lines are skipped.

    Raises:
        DeepSpecError: no such file, or a malformed line, with its number.
    """
    path = Path(path)
    prompts: list[Read] = []
    with _plain(path) as file:
        for number, (_, line) in enumerate(_lines(file, path), start=1):
            if line is not None and not line.strip():
                continue
            try:
                prompts.append(read_row(_parsed(line)))
            except BadRowError as error:
                raise DeepSpecError(f"{path}:{number}: malformed line: {error}") from None
    return prompts


class TableSource(Listing):
    """The rows of a dataset; one that cannot be read is a fault, since a user cannot mend a public dataset."""

    def __init__(self, dataset: Any, columns: Columns) -> None:
        super().__init__()
        self._dataset, self._columns = dataset, columns

    def raws(self) -> Iterator[Mapping]:
        return stored_rows(self._dataset)

    def read(self, raw: Mapping) -> Candidate:
        try:
            found: Read = read_row(without_nulls(raw), self._columns)
        except BadRowError as error:
            return Candidate(Chat(), fault=error.kind)
        return Candidate(found.chat, left_out=found.left_out)


def hub_source(spec: str, seed: int, columns: Columns = USUAL) -> TableSource:
    """Return the prompts of `<dataset>[:split]` or `<dataset>:<config>/<split>` in an order drawn from `seed`.

    The dataset may be a local directory.

    Raises:
        DeepSpecError: it cannot be loaded, or none of its columns holds prompts.
    """
    name, _, part = spec.partition(":")
    config, _, split = part.rpartition("/")
    dataset = load_split(name, config or None, split or "train").shuffle(seed=seed)
    known = {*columns.messages, *REQUESTS, "input_ids"}
    if known.isdisjoint(dataset.column_names):
        raise DeepSpecError(
            f"hub:{spec}: no column of prompts; found {', '.join(dataset.column_names)}; "
            f"looked for {', '.join(columns.messages)}"
        )
    return TableSource(dataset, columns)


def preset_source(spec: str, seed: int, max_malformed_share: float) -> Listing:
    """Return the prompts of a preset: `<name>`, or `<name>@<place>` with a copy of its dataset, JSONL or a directory.

    Raises:
        DeepSpecError: no such preset, or a dataset that cannot be read.
    """
    name, _, place = spec.partition("@")
    preset = Preset.named(name)
    file = Path(place)
    if (file.with_suffix("") if file.suffix in PACKED else file).suffix in (".jsonl", ".json"):
        return JsonlSource(place, seed, max_malformed_share, preset.columns)
    part = f"{preset.config}/{preset.split}" if preset.config else preset.split
    return hub_source(f"{place or preset.dataset}:{part}", seed, preset.columns)


def _parsed(line: bytes | None) -> Any:
    if line is None:
        raise BadRowError("a line that is too long", f"longer than {LONGEST_LINE >> 20} MiB")
    try:
        return json.loads(line.decode("utf-8-sig"), parse_constant=lambda _: None)  # NaN: a missing value
    except UnicodeDecodeError:
        raise BadRowError("not UTF-8") from None
    except RecursionError:
        raise BadRowError("nested too deeply") from None
    except ValueError as error:
        raise BadRowError("not JSON", " ".join(str(error).split())) from None


def _plain(path: Path) -> IO[bytes]:
    """Open a file, or a plain copy of a packed one or of a JSON array, a line each, that is gone when it is closed."""
    suffix = path.suffix.lower()
    if suffix in TABLES:
        raise DeepSpecError(
            f"{path}: not JSONL; name the directory that it is in as a dataset (hub:{path.parent}), or write one JSON "
            "object a line"
        )
    try:
        file = path.open("rb") if suffix not in PACKED else _unpacked(path, PACKED[suffix])
        return _lines_of_array(file, path) if _is_array(file) else file
    except FileNotFoundError:
        raise DeepSpecError(f"{path}: no such prompt file") from None
    except IsADirectoryError:
        raise DeepSpecError(
            f"{path}: is a directory; name a file in it, or the directory as a dataset (hub:{path})"
        ) from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DeepSpecError(
            f"{path}: cannot be read: {' '.join(str(error).split()) or type(error).__name__}"
        ) from None


def _unpacked(path: Path, opener: Callable[[Path], Any]) -> IO[bytes]:
    copy = tempfile.TemporaryFile()  # noqa: SIM115
    with opener(path) as packed:
        shutil.copyfileobj(packed, copy)
    copy.seek(0)
    return copy


def _is_array(file: IO[bytes]) -> bool:
    """Return whether a file is one JSON array of objects; an array a line is none."""
    first, second = file.readline(LONGEST_LINE), file.readline(LONGEST_LINE)
    file.seek(0)
    if not _ARRAY.match(first + second):
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return True
    return not second.strip()


def _lines_of_array(file: IO[bytes], path: Path) -> IO[bytes]:
    """Return a copy of a JSON array with an element a line; one element is held at a time."""
    copy = tempfile.TemporaryFile()  # noqa: SIM115
    read = 0
    try:
        with io.TextIOWrapper(file, encoding="utf-8-sig") as text:
            for element in _elements(text):
                copy.write(json.dumps(element).encode() + b"\n")
                read += 1
    except (ValueError, RecursionError) as error:
        raise DeepSpecError(
            f"{path}: element {read + 1} of the array cannot be read: {' '.join(str(error).split())}"
        ) from None
    copy.seek(0)
    return copy


def _elements(text: IO[str]) -> Iterator[Any]:
    decode = json.JSONDecoder(parse_constant=lambda _: None).raw_decode
    buffer = text.read(_CHUNK).lstrip()
    at = 1
    while True:
        at = _BETWEEN.match(buffer, at).end()  # type: ignore[union-attr]
        if buffer.startswith("]", at):
            return
        try:
            element, at = decode(buffer, at)
        except ValueError:
            more = text.read(max(_CHUNK, len(buffer) - at))
            if not more or len(buffer) - at > LONGEST_LINE:
                raise
            buffer, at = buffer[at:] + more, 0
        else:
            yield element


def _zstandard(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise DeepSpecError(f"{path} needs the package `pyarrow`: install deepspec[pipeline]") from None
    return pyarrow.input_stream(str(path), compression="zstd")


PACKED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _zstandard,
}


def _pieces(lines: Iterable[tuple[int, bytes | None]]) -> Iterator[list[_Line]]:
    """Yield lines with their numbers, some hundred at once; long ones fewer."""
    piece: list[_Line] = []
    size = 0
    for number, (offset, line) in enumerate(lines, start=1):
        piece.append((number, offset, line))
        size += len(line or b"")
        if len(piece) == _PIECE or size > _PIECE_BYTES:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


def _lines(file: IO[bytes], path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Yield every line with its offset; None for one that is too long to be read."""
    try:
        while True:
            offset = file.tell()
            line: bytes | None = file.readline(LONGEST_LINE)
            if not line:
                return
            if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                line = None
                while (rest := file.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
                    pass
            yield offset, line
    except OSError as error:
        raise DeepSpecError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
