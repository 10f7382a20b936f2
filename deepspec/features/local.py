"""Features: the target's states for every token of the distillation data.

These are the chosen layers' hidden states, the post-norm hidden state (with the head it gives the target's whole law)
and the log-normaliser of that law.

`CachedFeatures` computes them once into shards of safetensors, outside DVC, and memory-maps them; an interrupted
extraction goes on at the shard where it stopped. `OnlineFeatures` runs the target inside the training loop and stores
nothing.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from deepspec.errors import DeepSpecError
from deepspec.features.codec import codec
from deepspec.features.sequences import Sequence
from deepspec.files import digest, file_digest, replacing, write_json
from deepspec.lineage import code_digest
from deepspec.progress import Progress
from deepspec.target.attention import ForwardPass
from deepspec.target.model import H_LAST, Target

BATCH_TOKENS = 2048  # of a target pass
SHARD_TOKENS = 16384
MANIFEST = "manifest.json"
_FORMAT = 1
_NORM = "log_norm"


class Features(ABC):
    """The target's states for the sequences of a data set.

    Args:
        sequences: in the order of the data set.
        layers: target layer ids, concatenated in this order; `H_LAST` is the post-norm state.

    Attributes:
        ahead: whether they may be read on another thread, ahead of time.
    """

    ahead = True

    def __init__(self, target: Target, sequences: list[Sequence], layers: tuple[int, ...]):
        self.target, self.sequences, self.layers = target, sequences, layers

    @abstractmethod
    def rows(self, indices: list[int]) -> list[dict[int | str, Tensor]]:
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
        log_norm = [row[_NORM] for row in rows]
        return (
            pad_sequence(features, batch_first=True),
            pad_sequence(hidden, batch_first=True),
            pad_sequence(log_norm, batch_first=True),
        )

    def compute(self, indices: list[int]) -> list[dict[int | str, Tensor]]:
        """Compute `rows` by a pass of the target, on its device and in its dtype.

        Raises:
            DeepSpecError: the target's hidden states are not finite.
        """
        ids = pad_sequence([torch.tensor(self.sequences[i].ids) for i in indices], batch_first=True)
        ids = ids.to(self.target.device)
        positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        wanted = (*self.layers, H_LAST)
        step = ForwardPass(positions, wanted=wanted)  # causal: padding at the end is never seen
        self.target.forward(ids, step)
        rows = []
        for row, i in enumerate(indices):
            n = len(self.sequences[i].ids)
            found: dict[int | str, Tensor] = {layer: step.features[layer][row, :n] for layer in wanted}
            found[_NORM] = self.log_norm(found[H_LAST])
            if not bool(torch.isfinite(found[_NORM]).all()):
                raise DeepSpecError(f"conversation {i}: the target's logits are not finite")
            rows.append(found)
        return rows

    def log_norm(self, hidden: Tensor) -> Tensor:
        """Compute the log-normaliser of the law at post-norm states [n, d], in chunks."""
        return torch.cat([self.target.logits(part).float().logsumexp(-1) for part in hidden.split(256)])


class OnlineFeatures(Features):
    """Computed when asked for, by a target that shares the trainer's device; nothing is stored."""

    ahead = False

    def describe(self) -> dict[str, Any]:
        return {"mode": "online", "target": self.target.digest, "layers": list(self.layers)}

    def rows(self, indices: list[int]) -> list[dict[int | str, Tensor]]:
        return [
            {name: x if name == _NORM else x.to(torch.bfloat16) for name, x in row.items()}
            for row in self.compute(indices)
        ]


class CachedFeatures(Features):
    """Kept in shards, memory-mapped.

    Args:
        directory: of the shards.
        data_digest: of the data set that the sequences are from.
        form: a name in `deepspec.features.codec.CODECS`.
    """

    def __init__(
        self,
        directory: Path,
        target: Target,
        sequences: list[Sequence],
        layers: tuple[int, ...],
        data_digest: str,
        form: str = "bf16",
    ):
        super().__init__(target, sequences, layers)
        self.directory, self.codec = directory, codec(form)
        self.identity = {
            "format": _FORMAT,
            "target": target.digest,
            "dtype": target.precision,
            "layers": list(layers),
            "data": data_digest,
            "sequences": digest("".join(str(sequence.ids) for sequence in sequences)),
            "form": form,
        }
        self.manifest: dict[str, Any] = self.identity | {"shards": []}
        self._maps: dict[int, dict[str, Tensor]] = {}  # of shards that were read
        self._places: dict[int, tuple[int, int]] = {}  # sequence → shard and first row

    @classmethod
    def below(cls, root: Path, *what: Any) -> CachedFeatures:
        """Open the cache below `root` whose directory is named by all that the features depend on, code included.

        A finished one that has more layers serves as well: drafters of one target share what they can.
        """
        found = cls(root, *what)
        found.directory = root / found._name(found.identity)
        if not found.directory.exists():
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
        tokens = sum(len(sequence.ids) for sequence in self.sequences)
        return sum(shard["bytes"] for shard in self.manifest["shards"]) / tokens

    def build(self) -> None:
        """Compute the shards that are missing, sequences of like length together, longest first.

        Raises:
            DeepSpecError: the directory holds features of another target, data set or form.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / MANIFEST
        if path.exists():
            self.manifest = self._checked(path)
        plan = list(_shards(self.sequences))
        done = len(self.manifest["shards"])
        with Progress("features", len(plan), done, shown=done < len(plan)) as progress:
            for number in range(done, len(plan)):
                self.manifest["shards"].append(self._write(number, plan[number]))
                write_json(path, self.manifest)
                progress.advance()
        for number, batches in enumerate(plan):
            start = 0
            for i in (i for batch in batches for i in batch):
                self._places[i] = (number, start)
                start += len(self.sequences[i].ids)

    def rows(self, indices: list[int]) -> list[dict[int | str, Tensor]]:
        return [self._row(i) for i in indices]

    def _row(self, i: int) -> dict[int | str, Tensor]:
        number, start = self._places[i]
        shard = self._map(number)
        here = slice(start, start + len(self.sequences[i].ids))
        row: dict[int | str, Tensor] = {_NORM: shard[_NORM][here]}
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

    def _write(self, number: int, batches: list[list[int]]) -> dict[str, Any]:
        parts: dict[str, list[Tensor]] = {}
        for batch in batches:
            for row in self.compute(batch):
                for layer in {*self.layers, H_LAST}:
                    encoded = self.codec.encode(row[layer])
                    for part, tensor in encoded.items():
                        parts.setdefault(f"{layer}.{part}", []).append(tensor.cpu())
                    if layer == H_LAST and self.codec.group is not None:  # of what will be read back
                        row[_NORM] = self.log_norm(self.codec.decode(encoded).to(self.target.dtype))
                parts.setdefault(_NORM, []).append(row[_NORM].cpu())
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


def _shards(sequences: list[Sequence]) -> Iterator[list[list[int]]]:
    """Group sequences into shards, each a list of batches."""
    shard: list[list[int]] = []
    tokens = 0
    for batch in _like_lengths(sequences):
        shard.append(batch)
        tokens += sum(len(sequences[i].ids) for i in batch)
        if tokens >= SHARD_TOKENS:
            yield shard
            shard, tokens = [], 0
    if shard:
        yield shard


def _like_lengths(sequences: list[Sequence]) -> Iterator[list[int]]:
    """Group indices into batches of similar length, at most BATCH_TOKENS tokens with padding."""
    batch: list[int] = []
    for i in sorted(range(len(sequences)), key=lambda i: -len(sequences[i].ids)):
        if batch and len(sequences[batch[0]].ids) * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
