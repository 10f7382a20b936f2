"""The machine while a drafter trains: a thread that writes a line every few seconds, without MLflow or DVC.

The lines, under the names that MLflow shows as system metrics, go to `.deepspec/system/<drafter>.jsonl`; the last
one names the draft that came of it, so that nothing else is ever said to have been measured with it. A training that
was killed and resumed shows what its last process saw.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil
import torch

from deepspec.drafters.checkpoint import draft_digest

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
    path.parent.mkdir(parents=True, exist_ok=True)
    over = Event()
    with path.open("w", buffering=1) as file:  # whole lines
        thread = Thread(target=_sample_into, args=(file, over, every_s), daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
        file.write(json.dumps({"draft_digest": draft_digest(draft)}) + "\n")


def read_samples(path: Path, digest: str) -> list[dict[str, float]]:
    """Read the samples of the training that made draft `digest`; none if the file is of another one."""
    if not path.exists():
        return []
    *samples, last = [json.loads(line) for line in path.read_text().splitlines()] or [{}]
    return samples if last.get("draft_digest") == digest else []


def _sample_into(file: Any, over: Event, every_s: float) -> None:
    process = psutil.Process()
    psutil.cpu_percent()  # the first call only starts its clock
    while not over.wait(every_s):
        file.write(json.dumps(_sample(process)) + "\n")


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
