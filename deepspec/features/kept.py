"""States that the target left while it answered the prompts, so that training need not compute them again.

For each conversation a file of safetensors, named by its tokens, with the tensors of a shard of
`deepspec.features.local`. They are kept only where a token's bits do not depend on its company: then a shard made of
them is the one that a pass over the finished conversations makes. What is missing is computed.
"""

from __future__ import annotations

import errno
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from deepspec.decoding.recorder import Recorded, Recorder
from deepspec.features.codec import codec
from deepspec.features.extract import LOG_NORM, Extractor, Found
from deepspec.features.sequences import Sequences
from deepspec.features.states import file_name
from deepspec.files import digest, replacing, write_json
from deepspec.lineage import code_digest
from deepspec.target.ends import H_LAST, Ends
from deepspec.target.model import Target

logger = logging.getLogger(__name__)

KEPT = Path(".deepspec/kept")
SPARE = 1 << 30  # bytes of the disk that are left to everybody else
LAYERS = "layers.json"  # in a folder: whose outputs its files have


def folder_of(target: Ends, form: str, root: Path = KEPT) -> Path:
    """Return the folder of a target's states in a form, as this code makes them."""
    code = code_digest("deepspec.decoding.engine", __name__)
    return root / digest(json.dumps([target.digest, target.precision, form, code]))


class Keeper:
    """Writes what a recorder has of finished conversations.

    Args:
        form: of the states, as in `train.features.form`.
    """

    def __init__(self, folder: Path, recorder: Recorder, form: str):
        self.recorder, self._folder = recorder, folder
        self._codec = codec(form, recorder.target.hidden_size)
        self._written, self._ended = 0, False

    def keep(self, ids: list[int], found: Recorded) -> None:
        """Write what all tokens of a conversation left.

        Where the disk has no room for it and for the shards that training makes of all, a warning says so once, and
        training computes what is missing.
        """
        if self._ended:
            return
        try:
            if not self._written:
                self._folder.mkdir(parents=True, exist_ok=True)
                layers = [layer for layer in self.recorder.layers if layer != H_LAST]
                write_json(self._folder / LAYERS, layers)
            tensors = self._tensors(found)
            self._written += sum(x.nbytes for x in tensors.values())
            free = shutil.disk_usage(self._folder).free
            if free < self._written + SPARE:
                raise OSError(
                    errno.ENOSPC, f"{free >> 20} MiB are free, and training needs as much room again"
                )
            with replacing(self._folder / file_name(ids)) as scratch:
                save_file(tensors, scratch)
        except (OSError, SafetensorError) as error:
            self._ended = True
            reason = error.strerror if isinstance(error, OSError) else error
            logger.warning(
                "%s: no more states are kept, training computes the others: %s", self._folder, reason
            )

    def _tensors(self, found: Recorded) -> dict[str, Tensor]:
        tensors = {
            f"{layer}.{part}": x.contiguous()
            for layer, state in found.states.items()
            for part, x in self._codec.encode(state).items()
        }
        return tensors | {LOG_NORM: found.log_norm}


class KeptStates:
    """Reads kept states; those of a conversation that is not there are computed.

    Args:
        layers: whose outputs are kept beside the post-norm state.
        body: gives the target with its layers.
    """

    def __init__(
        self,
        folder: Path,
        layers: tuple[int, ...],
        target: Ends,
        body: Callable[[], Target],
        sequences: Sequences,
        form: str,
    ):
        self.folder, self.layers, self.target, self.sequences = folder, layers, target, sequences
        self._body, self._codec = body, codec(form, target.hidden_size)
        self._extractor: Extractor | None = None

    @classmethod
    def find(
        cls,
        target: Ends,
        body: Callable[[], Target],
        sequences: Sequences,
        layers: Sequence[int],
        form: str,
        root: Path = KEPT,
    ) -> KeptStates | None:
        """Return the kept states of a target; None where none are, or one of these layers is not among them."""
        folder = folder_of(target, form, root)
        try:
            kept = tuple(json.loads((folder / LAYERS).read_text()))
        except (OSError, ValueError):
            return None
        wanted = set(layers) <= {*kept, H_LAST}
        return cls(folder, kept, target, body, sequences, form) if wanted else None

    def rows(self, indices: list[int]) -> list[Found]:
        """Return the states of some sequences, as `Extractor.rows` does, or codes of them."""
        found = {i: row for i in indices if (row := self._read(i)) is not None}
        if missing := [i for i in indices if i not in found]:
            if self._extractor is None:
                self._extractor = Extractor(self._body(), self.sequences, self.layers)
            found |= dict(zip(missing, self._extractor.rows(missing), strict=True))
        return [found[i] for i in indices]

    def log_norm(self, hidden: Tensor) -> Tensor:
        """Return the log-normaliser of the law at post-norm states [n, d]."""
        return self.target.log_norm(hidden)

    def remove(self) -> None:
        """Remove the files: what is wanted of them is elsewhere."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self, i: int) -> Found | None:
        path = self.folder / file_name(self.sequences.ids(i).tolist())
        parts = ("codes", "scales") if self._codec.group is not None else ("codes",)
        try:
            with safe_open(path, "pt") as file:
                found: dict[int | str, Any] = {
                    layer: {part: file.get_tensor(f"{layer}.{part}") for part in parts}
                    for layer in (*self.layers, H_LAST)
                }
                return found | {LOG_NORM: file.get_tensor(LOG_NORM)}
        except (OSError, SafetensorError):  # not kept, or half written
            return None
