"""The machine while a drafter trains: a thread that writes a line every few seconds, without MLflow or DVC.

The lines, under the names that MLflow shows as system metrics, go to `.deepspec/system/<drafter>.jsonl`; the last
one names the draft that came of it, so that nothing else is ever said to have been measured with it. A training that
was killed and resumed shows what its last process saw.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import psutil
import torch

from deepspec.drafters.checkpoint import draft_digest
from deepspec.journal import Journal, read_journal

FOLDER = Path(".deepspec/system")
EVERY_S = 10.0
_MIB = 1 << 20


def samples_file(drafter: str, root: Path = Path()) -> Path:
    return root / FOLDER / f"{drafter}.jsonl"


@contextmanager
def watched(drafter: str, draft: Path, every_s: float = EVERY_S) -> Iterator[None]:
    """Sample while the block runs; its end is marked with the digest of `draft`. Of several processes the first."""
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    path = samples_file(drafter)
    path.unlink(missing_ok=True)
    over = Event()
    with Journal(path) as journal:
        thread = Thread(target=_sample_into, args=(journal, over, every_s), daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
        journal.append({"draft_digest": draft_digest(draft)})


def read_samples(path: Path, digest: str) -> list[dict[str, float]]:
    """Return the samples of the training that made draft `digest`; empty if unfinished, absent or of another."""
    *samples, last = [entry for _, entry in read_journal(path)] or [{}]
    return samples if last.get("draft_digest") == digest else []


def _sample_into(journal: Journal, over: Event, every_s: float) -> None:
    process = psutil.Process()
    psutil.cpu_percent()  # the first call only starts its clock
    while not over.wait(every_s):
        journal.append(_sample(process))


def _sample(process: psutil.Process) -> dict[str, float]:
    memory = psutil.virtual_memory()
    found = {
        "timestamp_ms": time.time_ns() // 1_000_000,
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / _MIB,
        "system_memory_usage_percentage": memory.percent,
        "process_memory_megabytes": process.memory_info().rss / _MIB,
    }
    if torch.cuda.is_initialized():  # asking would create a context
        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            found[f"gpu_{i}_memory_usage_megabytes"] = (total - free) / _MIB
            found[f"gpu_{i}_memory_usage_percentage"] = 100 * (total - free) / total
    return {name: round(value, 1) for name, value in found.items()}
