"""A training step beside SpecForge's: tokens/s, peak memory, and that both have the same loss.

DSpark, DFlash and EAGLE-3: forward and backward of the draft with its loss, on the same weights, inputs and anchors
(EAGLE-3: every token); the target's hidden states are given to both, embeddings and head are frozen. DFlash's block has
the anchor's place as well, in which nothing is predicted. Each side runs in a process of its own and they take turns,
step by step, so that a slow minute of the machine hits both. SpecForge is installed apart, without its dependencies:

    pip install --no-deps --target .deepspec/specforge specforge==0.2.0
    python -m benchmarks.training --specforge .deepspec/specforge
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.common import REPORTS, command_line, write_report
from benchmarks.training_steps import STEPS
from deepspec.drafters.algorithms.dspark import DSparkConfig, DSparkModel
from deepspec.drafters.algorithms.eagle3 import Eagle3Config, Eagle3Model
from deepspec.drafters.network import Network
from deepspec.errors import DeepSpecError
from deepspec.evaluation.stats import COVERAGE, RESAMPLES, Interval
from deepspec.markdown import markdown_table
from deepspec.progress import Progress

SIDES = ("deepspec", "specforge")
ROOT = Path(__file__).parents[1]
AGREED = 1e-3  # relative difference of the losses, in float32
_UNTIMED = 2


def network(algorithm: str, flags: argparse.Namespace) -> Network:
    """A draft for SmolLM2-135M, over its whole vocabulary; weights random, but for laws that are not flat."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": flags.hidden,
        "intermediate_size": flags.hidden * 8 // 3,
        "num_attention_heads": flags.hidden // 64,
        "num_key_value_heads": flags.hidden // 192,
        "head_dim": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 100000.0,
        "vocab_size": flags.vocab,
        "draft_vocab_size": flags.vocab,
        "num_target_layers": 30,
    }
    if algorithm == "eagle3":
        model = Eagle3Model(Eagle3Config(**sizes, target_layer_ids=(1, 14, 26), block_size=flags.block))
    else:
        dspark = algorithm == "dspark"
        config = DSparkConfig(
            **sizes,
            num_hidden_layers=flags.layers,
            target_layer_ids=(1, 8, 14, 20, 27),
            block_size=flags.block if dspark else flags.block + 1,
            mask_token_id=flags.vocab - 1,
            markov_rank=flags.rank if dspark else 0,
            enable_confidence_head=dspark,
        )
        model = DSparkModel(config)
        if dspark:
            model.markov_head.markov_w2.weight.data.normal_(std=0.02)
    model.lm_head.weight.data.normal_(std=2 * flags.hidden**-0.5)
    return model


def write_setup(directory: Path, algorithm: str, flags: argparse.Namespace, dtype: str) -> None:
    """Weights and inputs for both sides."""
    model = network(algorithm, flags)
    config, n = model.config, flags.length
    tensors: dict[str, Tensor] = model.stored(written_out=True)
    tensors |= {
        "features": torch.randn(1, n, flags.hidden * len(config.target_layer_ids)),
        "last_hidden": torch.randn(1, n, flags.hidden),
        "tokens": torch.randint(0, flags.vocab - 1, (1, n)),
        "anchors": torch.randperm(n - flags.block - 2)[: flags.anchors].sort().values[None] + 1,
    }
    save_file(tensors, directory / "setup.safetensors")
    setup = {"algorithm": algorithm, "sizes": config.to_dict(), "dtype": dtype}
    (directory / "setup.json").write_text(json.dumps(setup))


class Side:
    """A process that steps when asked.

    Raises:
        DeepSpecError: it does not start, or dies.
    """

    def __init__(self, name: str, directory: Path, specforge: Path):
        self.name = name
        paths = [str(ROOT), *([str(specforge.resolve())] if name == "specforge" else [])]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.training_steps", name, str(directory)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def step(self) -> dict[str, float]:
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return json.loads(self._answer())

    def _answer(self) -> str:
        for line in self.process.stdout:
            if line.startswith(("ready", "{")):
                return line
        last = self.process.stderr.read().strip().splitlines()[-1:] or ["no message"]
        raise DeepSpecError(f"{self.name} stopped: {last[0]}")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def measure(algorithm: str, flags: argparse.Namespace, dtype: str) -> dict[str, list[dict[str, float]]]:
    """Side → its steps, taken in turns."""
    what = f"{algorithm} in {dtype}"
    with tempfile.TemporaryDirectory() as scratch, Progress(what, flags.rounds) as progress:
        write_setup(Path(scratch), algorithm, flags, dtype)
        sides = [Side(name, Path(scratch), flags.specforge) for name in SIDES]
        steps: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
        for turn in range(_UNTIMED + flags.rounds):
            for side in sides if turn % 2 else reversed(sides):
                steps[side.name].append(side.step())
            if turn >= _UNTIMED:
                progress.advance()
        for side in sides:
            side.close()
    return {name: found[_UNTIMED:] for name, found in steps.items()}


def ratio(ours: list[float], theirs: list[float]) -> Interval:
    """The median of theirs / ours, paired by turn, with its bootstrap interval."""
    ratios = np.array(theirs) / np.array(ours)
    picks = np.random.default_rng(0).integers(len(ratios), size=(RESAMPLES, len(ratios)))
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(np.median(ratios[picks], axis=1), [tail, 1 - tail])
    return Interval(float(np.median(ratios)), float(low), float(high))


def summary(steps: dict[str, list[dict[str, float]]], length: int) -> dict[str, Any]:
    """Of one algorithm and dtype: medians, and theirs over ours."""
    columns = {
        name: {key: [step[key] for step in found] for key in found[0]} for name, found in steps.items()
    }
    ours, theirs = (columns[name] for name in SIDES)
    return {
        "tokens_per_second": {n: length / float(np.median(c["seconds"])) for n, c in columns.items()},
        "over_bytes": {n: float(np.median(c["over"])) for n, c in columns.items()},
        "peak_bytes": {n: float(np.median(c["peak"])) for n, c in columns.items()},
        "loss": {n: c["loss"][0] for n, c in columns.items()},
        "speed_ratio": asdict(ratio(ours["seconds"], theirs["seconds"])),
        "memory_ratio": float(np.median(ours["over"]) / np.median(theirs["over"])),
    }


def table(found: dict[str, dict[str, Any]]) -> str:
    """`found` by "algorithm, dtype"."""
    rows = []
    for what, one in found.items():
        for name in SIDES:
            speed = one["speed_ratio"]
            ours = name == "deepspec"
            rows.append(
                (
                    f"{what}: {name}",
                    f"{one['tokens_per_second'][name]:.0f}",
                    f"{speed['value']:.2f}× ({speed['low']:.2f} – {speed['high']:.2f})" if ours else "1",
                    f"{one['over_bytes'][name] / 2**20:.0f}",
                    f"{one['memory_ratio']:.2f}×" if ours else "1",
                    f"{one['peak_bytes'][name] / 2**20:.0f}",
                    f"{one['loss'][name]:.6f}",
                )
            )
    heads = ["", "tokens/s", "× SpecForge", "MiB of a step", "× SpecForge", "MiB of the process", "loss"]
    return markdown_table(heads, rows, "tn")


def arguments() -> argparse.ArgumentParser:
    parser = command_line("training", __doc__)
    add = parser.add_argument
    add("--specforge", type=Path, default=Path(".deepspec/specforge"), help="where it was installed")
    add("--algorithms", nargs="+", default=list(STEPS), choices=list(STEPS), help="default: all of them")
    add("--dtypes", nargs="+", default=["float32", "bfloat16"], help="default: float32 bfloat16")
    add("--rounds", type=int, default=10, help="steps of each side (default 10)")
    add("--anchors", type=int, default=64, help="blocks (default 64)")
    add("--block", type=int, default=7, help="γ (default 7)")
    add("--length", type=int, default=512, help="tokens of the sequence (default 512)")
    add("--vocab", type=int, default=49152, help="default 49152")
    add("--hidden", type=int, default=576, help="a multiple of 192 (default 576)")
    add("--layers", type=int, default=2, help="of the draft (default 2)")
    add("--rank", type=int, default=128, help="of DSpark's Markov head (default 128)")
    add("--output", type=Path, default=REPORTS, help="folder of the report")
    return parser


def main(argv: list[str] | None = None) -> int:
    flags = arguments().parse_args(argv)
    try:
        if not (flags.specforge / "specforge").is_dir():
            install = f"pip install --no-deps --target {flags.specforge} specforge==0.2.0"
            raise DeepSpecError(f"{flags.specforge}: no SpecForge there; {install}")
        found = {
            f"{algorithm}, {dtype}": summary(measure(algorithm, flags, dtype), flags.length)
            for algorithm in flags.algorithms
            for dtype in flags.dtypes
        }
    except DeepSpecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_report(flags.output, "training", "A training step beside SpecForge's", table(found), found)
    differ = [
        what
        for what, one in found.items()
        if "float32" in what and abs(one["loss"]["deepspec"] / one["loss"]["specforge"] - 1) > AGREED
    ]
    if differ:
        print(f"error: the losses differ: {'; '.join(differ)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
