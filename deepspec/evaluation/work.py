"""Pieces of work by key: shared among the processes of `accelerate launch`, each done once, kept until all is done.

Every process writes what it finished to a file of its own before it goes on, and every process reads all files when it
starts: a killed run goes on, with any number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env

from deepspec.journal import WorkLog, read_log
from deepspec.progress import Progress

_PATIENCE = timedelta(days=7)  # one process may have much more to do than the others


def process_state() -> PartialState:
    """Return this process's place among those that were launched together; alone without a launcher."""
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu, timeout=_PATIENCE) if "WORLD_SIZE" in os.environ else PartialState(cpu=cpu)


class Work:
    """Shares pieces of work between processes and keeps their results.

    Args:
        state: see `process_state`.
        directory: of the files.
        key: digest of all that a stored result depends on, so that none is taken over from another setting.
    """

    def __init__(self, state: PartialState, directory: str | Path, key: str) -> None:
        self.state = state
        directory = Path(directory)
        self._done: dict[str, Any] = {}
        for file in sorted(directory.glob(f"{key}.*.jsonl")):
            self._done |= read_log(file)
        self._share(self._done)  # nobody writes before all have read
        self._log = WorkLog(directory / f"{key}.{self.state.process_index}.jsonl")
        self._files = directory, f"{key}.*.jsonl"

    @property
    def processes(self) -> int:
        return self.state.num_processes

    @property
    def main(self) -> bool:
        """Whether this process is the one that speaks and writes."""
        return self.state.is_main_process

    def do(self, label: str, keys: Sequence[str], piece: Callable[[str], Any]) -> dict[str, Any]:
        """Results by key, the same in every process.

        Args:
            piece: makes the result of a key, which JSON can hold. It is called for those that no earlier run has
                finished, in the order of `keys`, here for this process's share of them.
        """
        missing = [key for key in keys if key not in self._done]
        mine = missing[self.state.process_index :: self.processes]
        if missing:
            before = len(keys) - len(missing)
            with Progress(label, len(keys), before, shown=self.main) as progress:
                for key in mine:
                    result = piece(key)
                    self._log.add(key, result)
                    self._done[key] = result
                    progress.advance(self.processes)
            self._share({key: self._done[key] for key in mine})
        return {key: self._done[key] for key in keys}

    def remove(self) -> None:
        """To be called once the results are safe elsewhere."""
        self._log.close()
        self.state.wait_for_everyone()
        if self.main:
            directory, pattern = self._files
            for file in directory.glob(pattern):
                file.unlink()

    def _share(self, results: dict[str, Any]) -> None:
        """Let every process have the results of all."""
        for part in gather_object([results]):
            self._done |= part
