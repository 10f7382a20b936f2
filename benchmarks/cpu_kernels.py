"""What our kernels for CPUs gain over torch's own: passes of one target on both, in turns, in one process.

    python -m benchmarks.cpu_kernels --target data/target --weights dense int4

Each row is a pass over so many new tokens of so many requests, the head's logits among it, behind a context of 300
tokens. The ratio is the median of those of the turns, in which both sides run one after the other, in changing order;
beside it stand the middle nine tenths of the turns. "Same bits": whether a token's logits are those that it has when it
is the only one of its pass.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import REPORTS, command_line, write_report
from deepspec.commands.profile import read_bandwidth, weight_bytes
from deepspec.entry import guarded, quiet_environment
from deepspec.errors import DeepSpecError
from deepspec.kernels import kernels, state
from deepspec.markdown import markdown_table
from deepspec.progress import watched
from deepspec.target.attention import ForwardPass, KVCache, tree_mask
from deepspec.target.model import WEIGHTS, Target, load_target

CONTEXT = 300
UNTIMED = 2  # turns


@dataclass(frozen=True)
class Shape:
    """A pass: so many new tokens of each of so many requests, in a chain or all children of the first."""

    tokens: int
    requests: int = 1
    tree: bool = False

    def __str__(self) -> str:
        of = f" of {self.requests} requests" if self.requests > 1 else ""
        return f"{self.tokens}{', a tree' if self.tree else ''}{of}"


SHAPES = (
    *(Shape(tokens) for tokens in (1, 2, 4, 6, 8)),
    *(Shape(tokens, tree=True) for tokens in (12, 16, 24)),
    *(Shape(1, requests) for requests in (4, 16, 64)),
    Shape(256),
)


class Side:
    """One target with a cache that holds the same context for every request."""

    def __init__(self, target: Target):
        self.target = target
        self.cache = KVCache(max(shape.requests for shape in SHAPES), 2 * CONTEXT)
        generator = torch.Generator().manual_seed(0)
        low = min(100, target.vocab_size // 4)
        self.ids = torch.randint(low, target.vocab_size, (2 * CONTEXT,), generator=generator)
        for row in range(self.cache.slots):
            self.forward(
                self.ids[:CONTEXT], ForwardPass(torch.arange(CONTEXT)[None], cache=self.cache, rows=[row])
            )

    @torch.inference_mode()
    def forward(self, ids: Tensor, step: ForwardPass) -> Tensor:
        return self.target.logits(self.target.forward(ids[None], step)[0])

    def run(self, shape: Shape) -> Tensor:
        """Return the logits [requests · tokens, vocab] of a pass."""
        n, tree = shape.tokens, None
        places = [CONTEXT + i for i in range(n)]
        if shape.tree:
            places = [CONTEXT, *[CONTEXT + 1] * (n - 1)]
            tree = tree_mask([[-1] * (n - 1)] * shape.requests, [CONTEXT] * shape.requests, n)
        step = ForwardPass(
            torch.tensor([places * shape.requests]),
            tree,
            cache=self.cache,
            starts=[CONTEXT] * shape.requests,
            counts=[n] * shape.requests,
        )
        return self.forward(self.ids[CONTEXT : CONTEXT + n].repeat(shape.requests), step)

    def same_bits(self, shape: Shape) -> bool:
        """Check whether the first two tokens, and the last request's first, have the logits that they have alone."""
        first = self.run(Shape(1))[0]
        step = ForwardPass(torch.tensor([[CONTEXT + 1]]), cache=self.cache, starts=[CONTEXT + 1])
        second = self.forward(self.ids[CONTEXT + 1 : CONTEXT + 2], step)[0]
        found = self.run(shape)
        same = torch.equal(found[0], first) and torch.equal(found[-shape.tokens], first)
        return same and (shape.tokens == 1 or torch.equal(found[1], second))


def measure(ours: Side, torchs: Side, shape: Shape, turns: int) -> dict[str, Any]:
    """Return the seconds of both sides by turn, and what they say of each other."""
    seconds: dict[str, list[float]] = {"ours": [], "torch": []}
    sides: list[tuple[str, Callable[[Shape], Tensor]]] = [("ours", ours.run), ("torch", torchs.run)]
    for turn in range(UNTIMED + turns):
        for name, run in sides if turn % 2 else sides[::-1]:
            began = time.perf_counter()
            run(shape)
            seconds[name].append(time.perf_counter() - began)
    mine, theirs = (np.array(seconds[name][UNTIMED:]) for name in ("ours", "torch"))
    ratios = theirs / mine
    return {
        "ours_s": median(mine),
        "torch_s": median(theirs),
        "ratio": [median(ratios), *np.quantile(ratios, (0.05, 0.95)).tolist()],
        "same_bits": [ours.same_bits(shape), torchs.same_bits(shape)],
    }


def main(argv: Sequence[str] | None = None) -> int:
    flags = arguments().parse_args(argv)
    quiet_environment()
    return guarded(lambda: run(flags))


def run(flags: argparse.Namespace) -> None:
    if kernels() is None:
        raise DeepSpecError(f"our kernels are {state()}")
    if flags.threads:
        torch.set_num_threads(flags.threads)
    data: dict[str, Any] = {}
    for weights in flags.weights:
        target = load_target(flags.target, dtype="bfloat16", device="cpu", weights=weights)
        ours, size = Side(target), weight_bytes(target)
        with patch("deepspec.target.fused.can_hold", return_value=False):
            other = load_target(flags.target, dtype="bfloat16", device="cpu", weights=weights)
            torchs = Side(other)
        rows = {str(shape): measure(ours, torchs, shape, flags.turns) for shape in watched(SHAPES, weights)}
        bandwidth = read_bandwidth(target.device, repeats=3)
        data[weights] = {"floor_s": size / bandwidth, "bandwidth": bandwidth, "passes": rows}
    write_report(flags.output, "cpu_kernels", "Our kernels beside torch's", body(data), data, target)


def body(data: dict[str, Any]) -> str:
    """Return the report in Markdown."""
    parts = []
    for weights, found in data.items():
        one = {side: next(iter(found["passes"].values()))[f"{side}_s"] for side in ("ours", "torch")}
        rows = [
            (
                name,
                *(
                    text
                    for side in ("ours", "torch")
                    for text in (f"{1000 * row[f'{side}_s']:.1f}", f"{row[f'{side}_s'] / one[side]:.2f}")
                ),
                "{:.2f} ({:.2f} – {:.2f})".format(*row["ratio"]),
                " / ".join("yes" if same else "no" for same in row["same_bits"]),
            )
            for name, row in found["passes"].items()
        ]
        header = ("new tokens", "ours, ms", "× one", "torch, ms", "× one", "gain", "same bits: ours / torch")
        floor = (
            f"Weights: {weights}. Reading them once takes {1000 * found['floor_s']:.1f} ms at "
            f"{found['bandwidth'] / 1e9:.1f} GB/s; a pass over one token takes {one['ours'] / found['floor_s']:.2f} "
            f"times that with our kernels, {one['torch'] / found['floor_s']:.2f} with torch's."
        )
        parts += [floor, markdown_table(header, rows, "tnnnnnt")]
    return "\n\n".join(parts)


def arguments() -> argparse.ArgumentParser:
    parser = command_line("cpu_kernels", __doc__)
    add = parser.add_argument
    add("--target", default="data/target", help="target directory (default %(default)s)")
    add("--weights", nargs="+", choices=list(WEIGHTS), default=["dense"], help="default: dense")
    add("--turns", type=int, default=15, help="timed, of each pass (default %(default)s)")
    add("--threads", type=int, help="default: torch's")
    add("--output", type=Path, default=REPORTS, help="folder of the report (default %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
