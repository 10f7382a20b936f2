"""The target's states asked of vLLM's servers while they are needed: each file is read, proven, and removed.

A request's states lie in the servers' folder from when it is answered to when it is read, so there are never more files
than requests in flight: what is asked for ahead is bounded by what the reader asks for.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepspec.decoding.served import RefusedError, Servers
from deepspec.errors import DeepSpecError
from deepspec.features.codec import Encoded
from deepspec.features.extract import LOG_NORM, Found, Row
from deepspec.features.local import Features
from deepspec.features.sequences import Sequence, Sequences
from deepspec.features.states import EngineStates
from deepspec.target.ends import H_LAST, Ends

LATE_S = 30.0  # in which a file that a server names is there


class ServedStates(EngineStates):
    """Asks servers for the states of sequences.

    Args:
        servers: with a folder, started with the layers of `engine_layers`.
        target: whose states they are; its layers are not needed.
        layers: our ids of the layers that are wanted beside the post-norm state.
        form: that the servers were started with, a name in `deepspec.features.codec.CODECS`.
    """

    def __init__(
        self,
        servers: Servers,
        target: Ends,
        sequences: Sequences,
        layers: tuple[int, ...],
        form: str = "bf16",
    ):
        if servers.folder is None:
            raise TypeError("these servers write no states")
        super().__init__(servers.folder, target, sequences, layers, form)
        self.servers = servers
        self._pool = ThreadPoolExecutor(servers.room, "states")

    def rows(self, indices: list[int]) -> list[Found]:
        """Return the states of some sequences, all asked for at once.

        Raises:
            DeepSpecError: a server that does not answer, or states that are not those that were asked for.
        """
        asked = [self._pool.submit(self._fetch, i) for i in indices]
        try:
            return [self._of_file(i, request.result()) for i, request in zip(indices, asked, strict=True)]
        finally:
            for request in asked:
                request.cancel()

    @contextmanager
    def file(self, i: int) -> Iterator[Path]:
        """Yield the file of a sequence's states; it is removed afterwards."""
        path = self._fetch(i)
        try:
            yield path
        finally:
            _remove(path)

    def _of_file(self, i: int, path: Path) -> Found:
        try:
            return self.row(i, path)
        finally:
            _remove(path)

    def _fetch(self, i: int) -> Path:
        """Ask for the states of a sequence; return their file when it is whole."""
        ids = self.sequences.ids(i).tolist()
        try:
            _, reply = self.servers.complete({"prompt": ids, "max_tokens": 1, "temperature": 0})
        except RefusedError as error:
            raise DeepSpecError(f"no states of conversation {i}: {error}") from None
        named = (reply.get("kv_transfer_params") or {}).get("hidden_states_path")
        if not isinstance(named, str):
            raise DeepSpecError(
                "vLLM's reply names no file of hidden states; start it with --speculative-config method "
                "extract_hidden_states and a connector that writes them (docs/training.md)"
            )
        path = self.folder / Path(named).name
        _await(path)
        return path


class ServedFeatures(Features):
    """The states of each batch, asked of vLLM when the batch is made; nothing is stored."""

    def __init__(
        self, states: ServedStates, target: Ends, sequences: Iterable[Sequence], layers: tuple[int, ...]
    ):
        super().__init__(target, sequences, layers)
        self._states = states

    def describe(self) -> dict[str, Any]:
        layers, form = list(self.layers), self._states.codec.name
        said = {"mode": "online", "target": self.target.digest, "layers": layers, "computed_by": "engine"}
        return said if form == "bf16" else said | {"form": form}

    def rows(self, indices: list[int]) -> list[Row]:
        return [{name: self._read(name, x) for name, x in row.items()} for row in self._states.rows(indices)]

    def _read(self, name: int | str, x: Tensor | Encoded) -> Tensor:
        """Return a part of a row, on the CPU, where batches are made; states in the form that is wanted."""
        codec = self._states.codec
        if isinstance(x, dict):
            return codec.decode(x)
        if name == LOG_NORM:
            return x.cpu()
        return (x.to(torch.bfloat16) if name == H_LAST else codec.decode(codec.encode(x))).cpu()


def _lock(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def _await(path: Path) -> None:
    """Wait until a file is written: its writer holds the lock beside it until then."""
    deadline = time.monotonic() + LATE_S
    while not path.exists():
        with suppress(FileNotFoundError), _lock(path).open() as lock:  # a shared folder may show it later
            fcntl.flock(lock, fcntl.LOCK_SH)
        if path.exists():
            return
        if time.monotonic() > deadline:
            raise DeepSpecError(
                f"{path}: vLLM says that the states are there, and they are not; is target.vllm.states_folder the "
                "folder that it writes to?"
            )
        time.sleep(0.01)


def _remove(path: Path) -> None:
    for each in (path, _lock(path)):
        each.unlink(missing_ok=True)
