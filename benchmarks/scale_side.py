"""One side of `benchmarks.scale`: reads a data set, counts its vocabulary and makes the first batches.

python benchmarks/scale_side.py DATA MAX_LENGTH STEPS        (PYTHONPATH: the checkout that is measured)

Run as a file by itself, also over checkouts of before, whose modules had other names and read whole data sets as lists.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SIZE, ANCHORS, GAMMA, SEED = 8, 40, 5, 0
COLUMNS, VOCABULARY, HELD_OUT = 8192, 49152, 32


class Store:
    """Features of no width: what making a batch takes beside reading them."""

    ahead = True

    def __init__(self, sequences: Any):
        self.sequences = sequences

    def batch(self, indices: list[int]) -> tuple[torch.Tensor, ...]:
        n = max(len(self.sequences[i].ids) for i in indices)
        wide = torch.zeros(len(indices), n, 1)
        return wide, wide, wide[..., 0]


def peak() -> int:
    """The largest resident memory since `forget`, in bytes; pages that are mapped from files are counted."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


def forget() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def reader(data: Path, length: int, work: Path) -> Callable[[], Any]:
    try:
        from deepspec.features.read import read_sequences
    except ImportError:  # checkouts of before
        from deepspec.data.sequences import read_sequences  # type: ignore[no-redef]

        return lambda: read_sequences(data, length, "all")[0]
    return lambda: read_sequences(data, length, "all", work)[0]


def counter(sequences: Any) -> Callable[[], Any]:
    rows = list(range(HELD_OUT, len(sequences)))
    if hasattr(sequences, "learnt_counts"):
        import numpy

        from deepspec.drafters.start import draft_vocabulary

        counted = numpy.array(rows)
        return lambda: draft_vocabulary(sequences.learnt_counts(counted, VOCABULARY), COLUMNS)
    from deepspec.training.run import draft_vocabulary

    return lambda: draft_vocabulary([sequences[i] for i in rows], COLUMNS, VOCABULARY)


def main(data: str, length: str, steps: str) -> None:
    from deepspec.training.batches import Batches

    found: dict[str, dict[str, float]] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        forget()
        began = time.perf_counter()
        result = call()
        found[name] = {"seconds": time.perf_counter() - began, "peak_bytes": peak()}
        return result

    with tempfile.TemporaryDirectory(dir=Path(data).parent) as work:
        read = reader(Path(data), int(length), Path(work))
        sequences = timed("read", read)
        del sequences
        sequences = timed("read again", read)
        ids = timed("vocabulary", counter(sequences))
        members = list(range(HELD_OUT, len(sequences)))
        state = hashlib.sha256(ids.numpy().tobytes())
        batches = timed("sampler", lambda: Batches(Store(sequences), members, SIZE, ANCHORS, GAMMA, SEED))

        def make(numbers: range) -> None:
            for step in numbers:
                for batch in batches.make(step):
                    for part in (batch.tokens, batch.anchors, batch.labels, batch.valid):
                        state.update(part.numpy().tobytes())

        timed("first batch", lambda: make(range(1)))
        timed("batches", lambda: make(range(1, int(steps))))
    print(json.dumps({"phases": found, "digest": state.hexdigest()[:16]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
