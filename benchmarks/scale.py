"""A data set of many conversations up to the first steps: peak memory and rows a second, beside an earlier version.

Synthetic conversations are written, read as sequences (anew, and again as a second drafter does), counted for the
draft vocabulary, and sampled into the batches of the first steps. Each side is a process of its own; both must make the
same vocabulary and the same batches to the byte. What the target and the draft compute is left out.

    git worktree add ../before 17885f3
    python -m benchmarks.scale --rows 1000000 --beside ../before
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import REPORTS, WORK_DIR, command_line, write_report
from benchmarks.scale_side import VOCABULARY
from deepspec.errors import DeepSpecError
from deepspec.files import digest, replacing
from deepspec.markdown import markdown_table
from deepspec.progress import Progress

ROOT = Path(__file__).parents[1]
PREFIX = 24  # tokens that all conversations begin with
_GROUP = 4096  # rows written at once


def write_data(directory: Path, rows: int, length: int) -> None:
    """Write conversations of random tokens, frequent ones more often, a fifth of each the prompt."""
    import pyarrow as pa
    import pyarrow.parquet

    schema = pa.schema([("input_ids", pa.list_(pa.int32())), ("loss_mask", pa.list_(pa.int8()))])
    rng = np.random.default_rng(0)
    with replacing(directory) as scratch, Progress("data", rows) as progress:
        scratch.mkdir()
        with pyarrow.parquet.ParquetWriter(scratch / "train.parquet", schema) as writer:
            for start in range(0, rows, _GROUP):
                count = min(_GROUP, rows - start)
                lengths = rng.integers(length * 3 // 4, length * 5 // 4 + 1, count)
                offsets = np.concatenate(([0], np.cumsum(lengths)))
                ids = (rng.random(offsets[-1]) ** 4 * (VOCABULARY - PREFIX) + PREFIX).astype(np.int32)
                places = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
                ids = np.where(places < PREFIX, places, ids).astype(np.int32)
                mask = (places >= np.repeat(lengths // 5, lengths)).astype(np.int8)
                columns = [
                    pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(part))
                    for part in (ids, mask)
                ]
                writer.write_table(pa.table(columns, schema=schema))
                progress.advance(count)
        (scratch / "manifest.json").write_text(json.dumps({"digest": digest(f"{rows} {length}")}))


def measure(checkout: Path, data: Path, length: int, steps: int) -> dict[str, Any]:
    """What `benchmarks.scale_side` finds in a fresh process over a checkout.

    Raises:
        DeepSpecError: it failed.
    """
    side = [str(Path(__file__).with_name("scale_side.py")), str(data), str(length), str(steps)]
    ran = subprocess.run(
        [sys.executable, *side],
        env=os.environ | {"PYTHONPATH": str(checkout.resolve())},
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode:
        last = ran.stderr.strip().splitlines()[-1:] or ["no message"]
        raise DeepSpecError(f"{checkout}: {last[0]}")
    return json.loads(ran.stdout.strip().splitlines()[-1])


def table(found: dict[str, dict[str, Any]], rows: int) -> str:
    """`found` by side; the last side is what the others are compared with."""
    reference = list(found.values())[-1]["phases"]
    lines = []
    for side, of in found.items():
        for phase, figures in of["phases"].items():
            ratio = reference[phase]["seconds"] / max(figures["seconds"], 1e-9)
            lines.append(
                (
                    f"{side}: {phase}",
                    f"{figures['seconds']:.2f}",
                    f"{rows / max(figures['seconds'], 1e-9):.0f}",
                    f"{ratio:.1f}×" if len(found) > 1 else "",
                    f"{figures['peak_bytes'] / 2**20:.0f}",
                )
            )
    return markdown_table(("phase", "s", "rows/s", "faster", "peak MiB"), lines, "tn")


def arguments() -> argparse.ArgumentParser:
    parser = command_line("scale", __doc__)
    add = parser.add_argument
    add("--rows", type=int, default=1_000_000, help="conversations (default: %(default)s)")
    add("--length", type=int, default=800, help="tokens of one, in the mean (default: %(default)s)")
    add("--steps", type=int, default=100, help="batches that are made (default: %(default)s)")
    add("--beside", type=Path, help="a checkout of an earlier version")
    add("--output", type=Path, default=REPORTS, help="folder of the report")
    return parser


def main(argv: list[str] | None = None) -> int:
    flags = arguments().parse_args(argv)
    data = (WORK_DIR / f"scale-{flags.rows}-{flags.length}").resolve()
    try:
        if flags.beside and not (flags.beside / "deepspec").is_dir():
            raise DeepSpecError(f"--beside {flags.beside}: no checkout of this project there")
        if not data.exists():
            write_data(data, flags.rows, flags.length)
        sides = {"here": ROOT} | ({"before": flags.beside} if flags.beside else {})
        found = {name: measure(path, data, 2 * flags.length, flags.steps) for name, path in sides.items()}
        if len({of["digest"] for of in found.values()}) > 1:
            raise DeepSpecError("the two versions make other batches of the same data")
    except DeepSpecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    body = f"{flags.rows} conversations of {flags.length} tokens.\n\n{table(found, flags.rows)}"
    write_report(flags.output, "scale", "A large data set up to the first steps", body, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
