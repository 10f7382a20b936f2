"""One side of `benchmarks.scale`: does one part of the work on a data set, and says what each phase of it took.

python benchmarks/scale_side.py PART DATA LENGTH STEPS        (PYTHONPATH: the checkout that is measured)

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
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

SIZE, ANCHORS, GAMMA, SEED = 8, 40, 5, 0
COLUMNS, VOCABULARY, HELD_OUT = 8192, 49152, 32
DIGEST = "0123456789abcdef"  # of the target that is said to have answered
HELD_OUT_TEXTS, HELD_OUT_WORDS = 1000, 60
MERGED = 100_000  # rows of shards, at most
SAMPLE = 100  # of so many rows one is in the validation's sample, as of a million with the default


class Store:
    """Features of no width: what making a batch takes beside reading them."""

    ahead = True

    def __init__(self, sequences: Any):
        self.sequences = sequences

    def batch(self, indices: list[int]) -> tuple[torch.Tensor, ...]:
        n = max(len(self.sequences[i].ids) for i in indices)
        wide = torch.zeros(len(indices), n, 1)
        return wide, wide, wide[..., 0]


class StandIn:
    """What a target is to the validation: a tokenizer with a template."""

    digest = DIGEST
    vocab_size = VOCABULARY
    max_length = 1 << 20

    def __init__(self, data: Path):
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
        self.stop_ids = frozenset([self.tokenizer.eos_token_id])
        self.chat_template_kwargs: dict[str, Any] = {}

    def chat_ids(
        self, messages: list[dict], add_generation_prompt: bool = True, tools: Any = (), options: Any = None
    ) -> list[int]:
        text = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=False
        )
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


class Phases:
    """Seconds and peak memory of each phase."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float]] = {}

    def timed(self, name: str, call: Callable[[], Any], rows: int | None = None) -> Any:
        """Call it; `rows`: how many it was about, where that is not the whole set."""
        forget()
        began = time.perf_counter()
        result = call()
        self.found[name] = {"seconds": time.perf_counter() - began, "peak_bytes": peak()}
        self.found[name] |= {} if rows is None else {"rows": rows}
        return result


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


def training(data: Path, length: int, steps: int, phases: Phases) -> str:
    """Read, count and make the first batches; the digest of the vocabulary and of all batches."""
    from deepspec.training.batches import Batches

    with tempfile.TemporaryDirectory(dir=data.parent) as work:
        read = reader(data, length, Path(work))
        sequences = phases.timed("read", read)
        del sequences
        sequences = phases.timed("read again", read)
        ids = phases.timed("vocabulary", counter(sequences))
        members = list(range(HELD_OUT, len(sequences)))
        state = hashlib.sha256(ids.numpy().tobytes())
        batches = phases.timed(
            "sampler", lambda: Batches(Store(sequences), members, SIZE, ANCHORS, GAMMA, SEED)
        )

        def make(numbers: range) -> None:
            for step in numbers:
                for batch in batches.make(step):
                    for part in (batch.tokens, batch.anchors, batch.labels, batch.valid):
                        state.update(part.numpy().tobytes())

        phases.timed("first batch", lambda: make(range(1)))
        phases.timed("batches", lambda: make(range(1, steps)))
    return state.hexdigest()[:16]


def held_out(data: Path) -> list[str]:
    """Texts in the place of evaluation prompts, which the conversations do not share an n-gram with."""
    words = sorted(word for word in found_words(data) if word.startswith(" "))
    rng = np.random.default_rng(1)
    picks = rng.integers(0, len(words), (HELD_OUT_TEXTS, HELD_OUT_WORDS))
    return ["".join(words[i] for i in row) for row in picks]


def found_words(data: Path) -> list[str]:
    return list(json.loads((data / "tokenizer/tokenizer.json").read_text())["model"]["vocab"])


def validation(data: Path, length: int, steps: int, phases: Phases) -> str:
    """Validate the data set; the digest of what did not pass."""
    validate = found("deepspec.guard.suite:validate_data", "deepspec.data.quality:validate_data")
    read = found(
        "deepspec.messages.prompts:read_prompts",
        "deepspec.messages.prompt:read_prompts",
        "deepspec.data.rows:read_prompts",
    )
    params = found("deepspec.guard.params:ValidateParams", "deepspec.config:ValidateParams")
    overlap = found("deepspec.prompts.overlap:Overlap", "deepspec.data.overlap:Overlap")
    target, evaluation = StandIn(data), overlap(held_out(data), 8)
    if "Callable" in str(list(inspect.signature(validate).parameters.values())[-1].annotation):
        evaluation = evaluation.hits
    bounds = params()
    if "sample" in params.model_fields:
        import pyarrow.parquet

        rows = pyarrow.parquet.read_metadata(data / "train.parquet").num_rows
        bounds = params(sample=max(1, rows // SAMPLE))

    def run() -> Any:
        return validate(data, read(data / "prompts.jsonl"), bounds, length, target, evaluation)

    result = phases.timed("validate", run)
    return ", ".join(check.name for check in result.failed) or "passed"


def prompts(data: Path, length: int, steps: int, phases: Phases) -> str:
    """Make training prompts of a file with bad rows; what became of its rows."""
    build = found("deepspec.prompts.build:build_prompts")
    write = found("deepspec.prompts.build:write_prompts")
    params = found("deepspec.prompts.params:PromptsParams")
    texts = held_out(data)
    with (data / "source.jsonl").open("rb") as file:
        count = sum(1 for _ in file)
    source = f"jsonl:{data / 'source.jsonl'}"
    with tempfile.TemporaryDirectory(dir=data.parent) as work:
        chosen = params(count=count, mix={source: 1.0})

        def run() -> Any:
            built = build(chosen, SEED, texts, work_dir=Path(work) / "work")
            write(built, Path(work) / "out")
            return built.manifest

        manifest = phases.timed("prompts", run)
    (of,) = manifest["sources"].values()
    unusable = [kind["rows"] for kind in of.get("unusable", {}).values()]
    rejected = sum(manifest["rejected"].values())
    lost = count - of["accepted"] - sum(unusable) - rejected
    return (
        f"{of['accepted']} of {count} rows accepted, {sum(unusable)} of {len(unusable)} kinds cannot be used, "
        f"{rejected} rejected, {lost} lost"
    )


def merge(data: Path, length: int, steps: int, phases: Phases) -> str:
    """Make a data set of shards of answers; how many rows it has."""
    import pyarrow.parquet

    read, assemble = (found(f"deepspec.answers.shards:{name}") for name in ("read_work", "assemble"))
    settings = {"temperature": 0.7, "top_p": 1.0, "engine": "local"}
    names = ["id", "source", "messages", "input_ids", "loss_mask", "finish_reasons", "seed"]
    ids: list[str] = []
    with tempfile.TemporaryDirectory(dir=data.parent) as scratch:
        with (
            pyarrow.parquet.ParquetFile(data / "train.parquet", pre_buffer=False) as file,
            (Path(scratch) / "shard-0-of-1.jsonl").open("w") as shard,
        ):
            rows = (row for batch in file.iter_batches(1024, columns=names) for row in batch.to_pylist())
            for row in islice(rows, MERGED):
                ids.append(row["id"])
                shard.write(json.dumps({"id": row["id"], "rows": [row], "endings": []}) + "\n")
        work = phases.timed("read shards", lambda: read(Path(scratch)), len(ids))
        out = Path(scratch) / "out"
        manifest = phases.timed("merge", lambda: assemble(work, ids, out, settings, DIGEST), len(ids))
        groups = pyarrow.parquet.read_metadata(out / "train.parquet").num_row_groups
    return f"{manifest['rows']} of {len(ids)} rows in {groups} row groups"


PARTS = {"prompts": prompts, "merge": merge, "validation": validation, "training": training}


def main(part: str, data: str, length: str, steps: str) -> None:
    phases = Phases()
    result = PARTS[part](Path(data), int(length), int(steps), phases)
    print(json.dumps({"phases": phases.found, "result": result}))


if __name__ == "__main__":
    only_from_path()
    main(*sys.argv[1:])
