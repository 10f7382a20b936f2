"""States that the target left while it answered the prompts, so that training need not compute them again.

For each conversation a file of safetensors, named by its tokens, with the tensors of a shard of
`deepspec.features.local`; beside them what all of them depend on. They are kept only where a token's bits do not depend
on its company: then a shard made of them is the one that a pass over the finished conversations makes. What is missing
is computed.

A folder lies under the name of the work that it comes from, and under that of the data set once this is finished;
then no other is left. Files go as they are read.
"""

from __future__ import annotations

import errno
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from deepspec.decoding.recorder import Recorded, Recorder
from deepspec.features.codec import codec
from deepspec.features.extract import LOG_NORM, Extractor, Found
from deepspec.features.sequences import Sequences
from deepspec.features.states import file_name
from deepspec.files import replacing, write_json
from deepspec.lineage import code_digest
from deepspec.target.ends import H_LAST, Ends
from deepspec.target.model import Target

logger = logging.getLogger(__name__)

KEPT = Path(".deepspec/kept")
RECORD = "kept.json"  # what the files of a folder depend on, and of which layers they are
SPARE = 1 << 30  # bytes of the disk that are left to everybody else


def _depends_on(target: Ends, form: str) -> dict[str, Any]:
    code = code_digest("deepspec.features.local")  # states that are computed are of the same
    return {"target": target.digest, "dtype": target.precision, "form": form, "code": code}


class Keeper:
    """Writes what a recorder has of finished conversations.

    Args:
        form: of the states, as in `train.features.form`.
    """

    def __init__(self, recorder: Recorder, form: str, root: Path = KEPT):
        self.recorder, self._root, self._folder = recorder, root, root
        self._codec = codec(form, recorder.target.hidden_size)
        layers = [layer for layer in recorder.layers if layer != H_LAST]
        self._record = _depends_on(recorder.target, form) | {"layers": layers}
        self._begun, self._ended = False, False

    def begin(self, work: str) -> None:
        """Keep states under the name of a work from now on."""
        self._folder = self._root / work

    def keep(self, ids: list[int], found: Recorded) -> None:
        """Write what all tokens of a conversation left.

        Where the disk has no room for it, a warning says so once, and training computes what is missing. So it does
        with states that are no numbers, which it refuses.
        """
        if self._ended or not bool(torch.isfinite(found.log_norm).all()):
            return
        tensors = self._tensors(found)
        try:
            if not self._begun:
                self._folder.mkdir(parents=True, exist_ok=True)
                write_json(self._folder / RECORD, self._record)
                self._begun = True
            if (free := shutil.disk_usage(self._folder).free) < SPARE:
                raise OSError(errno.ENOSPC, f"no more than {free >> 20} MiB of the disk are free")
            with replacing(self._folder / file_name(ids)) as scratch:
                save_file(tensors, scratch)
        except (OSError, SafetensorError) as error:
            self._ended = True
            reason = error.strerror if isinstance(error, OSError) else error
            logger.warning(
                "%s: no more states are kept, training computes the others: %s", self._folder, reason
            )

    def finish(self, data: str) -> None:
        """Name the states after the finished data set; those of any other go."""
        own = self._root / data
        if self._folder.exists():
            shutil.rmtree(own, ignore_errors=True)
            self._folder.rename(own)
        for other in self._root.glob("*"):
            if other != own:
                shutil.rmtree(other, ignore_errors=True)

    def _tensors(self, found: Recorded) -> dict[str, Tensor]:
        tensors = {
            f"{layer}.{part}": x.contiguous()
            for layer, state in found.states.items()
            for part, x in self._codec.encode(state).items()
        }
        return tensors | {LOG_NORM: found.log_norm}


class KeptStates:
    """Reads kept states, each once; those of a conversation that is not there are computed.

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
        data: str,
        target: Ends,
        body: Callable[[], Target],
        sequences: Sequences,
        layers: Sequence[int],
        form: str,
        root: Path = KEPT,
    ) -> KeptStates | None:
        """Return the kept states of a data set; None where none are, or one of these layers is not among them.

        States of another target, form or code are of no use to anybody, and go.
        """
        folder = root / data
        try:
            record = json.loads((folder / RECORD).read_text())
            kept = tuple(record.pop("layers"))
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None
        if record != _depends_on(target, form):
            shutil.rmtree(folder, ignore_errors=True)
            return None
        wanted = set(layers) <= {*kept, H_LAST}
        return cls(folder, kept, target, body, sequences, form) if wanted else None

    def rows(self, indices: list[int]) -> list[Found]:
        """Return the states of some sequences, as `Extractor.rows` does, or codes of them; their files go."""
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
        """Remove the folder: what is wanted of it is elsewhere."""
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
                found[LOG_NORM] = file.get_tensor(LOG_NORM)
        except (OSError, SafetensorError):  # not kept, or half written
            return None
        path.unlink(missing_ok=True)
        return found
