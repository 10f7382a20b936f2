"""One side of `benchmarks.scale`: reads a data set, counts its vocabulary and makes the first batches.

python benchmarks/scale_side.py DATA MAX_LENGTH STEPS        (PYTHONPATH: the checkout that is measured)

Run as a file by itself, also over checkouts of before, whose modules had other names and read whole data sets as lists.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
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


def only_from_path() -> None:
    """Leave an editable installation out, which would lend the modules that an earlier checkout lacks."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]


def found(*places: str) -> Any:
    """The first function that a checkout has of `module:name`; they moved over time."""
    for place in places:
        module, _, name = place.partition(":")
        with suppress(ImportError, AttributeError):
            return getattr(importlib.import_module(module), name)
    raise ImportError(f"none of {', '.join(places)}")


def reader(data: Path, length: int, work: Path) -> Callable[[], Any]:
    read = found(
        *(
            f"deepspec.{module}:read_sequences"
            for module in ("features.read", "features.sequences", "data.sequences")
        )
    )
    options = {"work": work} if "work" in inspect.signature(read).parameters else {}
    return lambda: read(data, length, "all", **options)[0]


def counter(sequences: Any) -> Callable[[], Any]:
    """Makes the draft vocabulary of all rows but the first."""
    rows = list(range(HELD_OUT, len(sequences)))
    vocabulary = found("deepspec.drafters.start:draft_vocabulary", "deepspec.training.run:draft_vocabulary")
    first = next(iter(inspect.signature(vocabulary).parameters))
    if first == "counts":
        return lambda: vocabulary(sequences.learnt_counts(np.array(rows), VOCABULARY), COLUMNS)
    if first == "sequences":
        return lambda: vocabulary([sequences[i] for i in rows], COLUMNS, VOCABULARY)

    def learnt() -> Iterator[int]:
        for i in rows:
            pairs = zip(sequences[i].ids, sequences[i].learnt, strict=True)
            yield from (token for token, marked in pairs if marked)

    return lambda: vocabulary(learnt(), COLUMNS, VOCABULARY)


def main(data: str, length: str, steps: str) -> None:
    from deepspec.training.batches import Batches

    phases: dict[str, dict[str, float]] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        forget()
        began = time.perf_counter()
        result = call()
        phases[name] = {"seconds": time.perf_counter() - began, "peak_bytes": peak()}
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
    print(json.dumps({"phases": phases, "digest": state.hexdigest()[:16]}))


if __name__ == "__main__":
    only_from_path()
    main(*sys.argv[1:])
