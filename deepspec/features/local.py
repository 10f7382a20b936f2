"""Features: the target's states for every token of the distillation data.

These are the chosen layers' hidden states, the post-norm hidden state (with the head it gives the target's whole law)
and the log-normaliser of that law.

`CachedFeatures` computes them once into shards of safetensors, outside DVC, and memory-maps them. All processes do,
each its share of the shards, and an interrupted extraction goes on at the shards that are missing. `OnlineFeatures`
runs the target inside the training loop and stores nothing.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from deepspec.errors import DeepSpecError
from deepspec.features.codec import codec
from deepspec.features.extract import LOG_NORM, Extractor, Found, Row
from deepspec.features.sequences import Ints, Sequence, Sequences
from deepspec.files import digest, file_digest, replacing, write_json
from deepspec.lineage import code_digest
from deepspec.progress import Progress
from deepspec.target.ends import H_LAST, Ends
from deepspec.target.model import Target

BATCH_TOKENS = 2048  # of a target pass
SHARD_TOKENS = 16384
MANIFEST = "manifest.json"
_FORMAT = 1
Batch = Ints  # indices of sequences that are computed in one pass


class Features(ABC):
    """The target's states for the sequences of a data set.

    Args:
        target: whose states they are.
        sequences: in the order of the data set.
        layers: target layer ids, concatenated in this order; `H_LAST` is the post-norm state.

    Attributes:
        ahead: whether they may be read on another thread, ahead of time.
    """

    ahead = True

    def __init__(self, target: Ends, sequences: Iterable[Sequence], layers: tuple[int, ...]):
        self.target, self.sequences, self.layers = target, Sequences.of(sequences), layers

    @abstractmethod
    def rows(self, indices: list[int]) -> list[Row]:
        """Return for each sequence: layer → bfloat16 [n, d] for all layers and `H_LAST`; "log_norm" → float32 [n]."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Describe the features, for a manifest that DVC tracks."""

    def batch(self, indices: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return features [b, n, layers·d], hidden [b, n, d] and log_norm [b, n] of some sequences, zero-padded."""
        rows = self.rows(indices)
        hidden = [row[H_LAST] for row in rows]
        features = [
            torch.cat([row[layer] for layer in self.layers], -1)
            if self.layers
            else last.new_empty(len(last), 0)
            for row, last in zip(rows, hidden, strict=True)
        ]
        log_norm = [row[LOG_NORM] for row in rows]
        return (
            pad_sequence(features, batch_first=True),
            pad_sequence(hidden, batch_first=True),
            pad_sequence(log_norm, batch_first=True),
        )


class OnlineFeatures(Features):
    """Computed when asked for, by a target that shares the trainer's device; nothing is stored."""

    ahead = False

    def __init__(self, target: Target, sequences: Iterable[Sequence], layers: tuple[int, ...]):
        super().__init__(target, sequences, layers)
        self._extractor = Extractor(target, self.sequences, layers)

    def describe(self) -> dict[str, Any]:
        return {"mode": "online", "target": self.target.digest, "layers": list(self.layers)}

    def rows(self, indices: list[int]) -> list[Row]:
        return [
            {name: x if name == LOG_NORM else x.to(torch.bfloat16) for name, x in row.items()}
            for row in self._extractor.rows(indices)
        ]


class StateSource(Protocol):
    """What has a target's states: one that runs here (`Extractor`), or files of an engine's (`EngineStates`)."""

    def rows(self, indices: list[int]) -> SequenceOf[Found]:
        """Return the states of some sequences, in the target's dtype or in the form that is wanted."""

    def log_norm(self, hidden: Tensor) -> Tensor:
        """Return the log-normaliser of the law at post-norm states [n, d]."""


@dataclass(frozen=True)
class Share:
    """A process's part of work that several do.

    Args:
        rank: its number among `world`.
        wait: returns when all have called it.
    """

    rank: int = 0
    world: int = 1
    wait: Callable[[], object] = lambda: None


class CachedFeatures(Features):
    """Kept in shards, memory-mapped.

    Args:
        directory: of the shards.
        data_digest: of the data set that the sequences are from.
        form: a name in `deepspec.features.codec.CODECS`.
        computed_by: whose arithmetic they are of, if not the target's as it runs here.
    """

    def __init__(
        self,
        directory: Path,
        target: Ends,
        sequences: Iterable[Sequence],
        layers: tuple[int, ...],
        data_digest: str,
        form: str = "bf16",
        computed_by: str | None = None,
    ):
        super().__init__(target, sequences, layers)
        self.directory, self.codec = directory, codec(form, target.hidden_size)
        self.identity = {
            "format": _FORMAT,
            "target": target.digest,
            "dtype": target.precision,
            "layers": list(layers),
            "data": data_digest,
            "sequences": self.sequences.digest,
            "form": form,
        }
        if computed_by is not None:
            self.identity["computed_by"] = computed_by
        self.manifest: dict[str, Any] = self.identity | {"shards": []}
        self._maps: dict[int, dict[str, Tensor]] = {}  # of shards that were read
        self._shard_of, self._first = (np.zeros(len(self.sequences), np.int64) for _ in range(2))
        self._source: StateSource | None = None  # while shards are written

    @classmethod
    def below(cls, root: Path, *what: Any) -> CachedFeatures:
        """Open the cache below `root` whose directory is named by all that the features depend on, code included.

        A finished one that has more layers serves as well: drafters of one target share what they can.
        """
        found = cls(root, *what)
        found.directory = root / found._name(found.identity)
        if not found.complete:
            for path in sorted(root.glob(f"*/{MANIFEST}")):
                if found._serves(path):
                    found.directory = path.parent
                    found.identity["layers"] = json.loads(path.read_text())["layers"]
                    break
        return found

    def _name(self, identity: dict[str, Any]) -> str:
        return digest(json.dumps(identity) + code_digest(__name__))

    def _serves(self, path: Path) -> bool:
        manifest = json.loads(path.read_text())
        whole = self.identity | {"layers": manifest["layers"]}
        return (
            set(self.layers) <= {*manifest["layers"], H_LAST}
            and path.parent.name == self._name(whole)
            and len(manifest["shards"]) == len(list(_shards(self.sequences)))
        )

    def describe(self) -> dict[str, Any]:
        return {"mode": "cached", "bytes_a_token": round(self.bytes_a_token, 1), **self.manifest}

    @property
    def bytes_a_token(self) -> float:
        tokens = int(self.sequences.lengths.sum())
        return sum(shard["bytes"] for shard in self.manifest["shards"]) / tokens

    @property
    def complete(self) -> bool:
        """Check whether all shards are there, so that `build` computes none."""
        path = self.directory / MANIFEST
        return path.exists() and len(self._checked(path)["shards"]) == len(list(_shards(self.sequences)))

    def build(self, source: Callable[[], StateSource] | None = None, share: Share = Share()) -> None:
        """Compute the shards that are missing, sequences of like length together, longest first.

        Args:
            source: gives what computes or has the states, asked for only if shards are missing; None: the target that
                the features were made with computes them.
            share: of the missing shards; every process calls this.

        Raises:
            DeepSpecError: the directory holds features of another target, data set or form.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / MANIFEST
        if path.exists():
            self.manifest = self._checked(path)
        plan = list(_shards(self.sequences))
        if len(self.manifest["shards"]) != len(plan):
            self._extract(plan, source or self._own_source, share)
        for number, batches in enumerate(plan):
            rows = np.concatenate(batches)
            self._shard_of[rows] = number
            self._first[rows] = np.cumsum([0, *self.sequences.lengths[rows[:-1]]])

    def _extract(self, plan: list[list[Batch]], source: Callable[[], StateSource], share: Share) -> None:
        """Compute this process's part of the shards that have no entry, and write the manifest when all have one."""
        missing = [number for number in range(len(plan)) if self._entry(number) is None]
        share.wait()  # until all know the same to be missing
        path, mine = self.directory / MANIFEST, missing[share.rank :: share.world]
        if share.rank == 0:
            write_json(path, self.identity | {"shards": []})
        if mine:
            self._source = source()
            with Progress("features", len(mine), shown=share.rank == 0) as progress:
                for number in mine:
                    write_json(self._entry_path(number), self._write(number, plan[number]))
                    progress.advance()
            self._source = None
        share.wait()
        entries = [self._entry(number) for number in range(len(plan))]
        if lost := [number for number, entry in enumerate(entries) if entry is None]:
            raise DeepSpecError(
                f"{self.directory}: {len(lost)} of {len(plan)} shards are not there, though every process has computed "
                "its own; several machines need a shared folder (train.features.directory)"
            )
        self.manifest = self.identity | {"shards": entries}
        share.wait()
        if share.rank == 0:
            write_json(path, self.manifest)
            for number in range(len(plan)):
                self._entry_path(number).unlink(missing_ok=True)

    def _own_source(self) -> StateSource:
        if not isinstance(self.target, Target):
            raise TypeError("features can only be computed by a target with its layers")
        return Extractor(self.target, self.sequences, self.layers)

    def _entry(self, number: int) -> dict[str, Any] | None:
        """Return what the manifest says of a shard that a process has finished; None if it is not there."""
        try:
            entry = json.loads(self._entry_path(number).read_text())
            whole = self._path(number).stat().st_size == entry["bytes"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return entry if whole else None

    def _entry_path(self, number: int) -> Path:
        return self._path(number).with_suffix(".json")

    def rows(self, indices: list[int]) -> list[Row]:
        return [self._row(i) for i in indices]

    def _row(self, i: int) -> Row:
        shard, start = self._map(int(self._shard_of[i])), int(self._first[i])
        here = slice(start, start + int(self.sequences.lengths[i]))
        row: Row = {LOG_NORM: shard[LOG_NORM][here]}
        for layer in {*self.layers, H_LAST}:
            parts = ("codes", "scales") if self.codec.group is not None else ("codes",)
            row[layer] = self.codec.decode({part: shard[f"{layer}.{part}"][here] for part in parts})
        return row

    def _checked(self, path: Path) -> dict[str, Any]:
        try:
            found = json.loads(path.read_text())
        except ValueError:
            raise DeepSpecError(f"{path}: not a manifest of features; delete {path.parent}") from None
        for name, value in self.identity.items():
            if found.get(name) != value:
                raise DeepSpecError(
                    f"{path.parent}: features of another {name} ({found.get(name)}, wanted {value}); "
                    "give another directory or delete it"
                )
        return found

    def _write(self, number: int, batches: list[Batch]) -> dict[str, Any]:
        parts: dict[str, list[Tensor]] = {}
        source = self._source
        if source is None:
            raise TypeError("shards are written by `build`")
        for batch in batches:
            for row in source.rows(batch.tolist()):
                log_norm = cast(Tensor, row[LOG_NORM])
                for layer in {*self.layers, H_LAST}:
                    state = row[layer]
                    encoded = state if isinstance(state, dict) else self.codec.encode(state)
                    for part, tensor in encoded.items():
                        parts.setdefault(f"{layer}.{part}", []).append(tensor.cpu())
                    if layer == H_LAST and self.codec.group is not None:  # of what will be read back
                        log_norm = source.log_norm(self.codec.decode(encoded).to(self.target.dtype))
                parts.setdefault(LOG_NORM, []).append(log_norm.cpu())
        path = self._path(number)
        with replacing(path) as scratch:
            save_file({name: torch.cat(tensors) for name, tensors in parts.items()}, scratch)
        return {"file": path.name, "bytes": path.stat().st_size, "sha256": file_digest(path)}

    def _map(self, number: int) -> dict[str, Tensor]:
        """Memory-map a shard's tensors; its checksum is verified when it is first read."""
        if number not in self._maps:
            path, entry = self._path(number), self.manifest["shards"][number]
            if not path.exists() or file_digest(path) != entry["sha256"]:
                raise DeepSpecError(
                    f"{path}: missing or damaged; delete {self.directory} to compute it again"
                )
            with safe_open(path, "pt") as file:
                self._maps[number] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return self._maps[number]

    def _path(self, number: int) -> Path:
        return self.directory / f"features-{number:05d}.safetensors"


def _shards(sequences: Sequences) -> Iterator[list[Batch]]:
    """Group sequences into shards, each a list of batches."""
    shard: list[Batch] = []
    tokens = 0
    for batch in _like_lengths(sequences.lengths):
        shard.append(batch)
        tokens += int(sequences.lengths[batch].sum())
        if tokens >= SHARD_TOKENS:
            yield shard
            shard, tokens = [], 0
    if shard:
        yield shard


def _like_lengths(lengths: Ints) -> Iterator[Batch]:
    """Group indices into batches of similar length, at most BATCH_TOKENS tokens with padding."""
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        size = max(BATCH_TOKENS // max(int(lengths[order[start]]), 1), 1)
        yield order[start : start + size]
        start += size
